"""Solutions of lesson 19, Two ranks: each body stands where the exercise, ../19_two_ranks.py, has its stub."""


def my_heads(rank: int, ranks: int, heads: int) -> range:
    """lesson 19, task 1: my_heads"""
    if heads % ranks:
        raise ValueError(f"{heads} heads cannot be dealt out evenly to {ranks} ranks")
    each = heads // ranks
    return range(rank * each, (rank + 1) * each)


def cut(model: TinyModel, layer: int, rank: int, ranks: int) -> Part:
    """lesson 19, task 2: cut"""
    heads = my_heads(rank, ranks, model.heads)
    mine = slice(heads.start, heads.stop)
    qkv = model.qkv[layer].view(model.width, 3, model.heads, model.head_dim)[:, :, mine]
    out = model.out[layer].view(model.heads, model.head_dim, model.width)[mine]
    columns = 4 * model.width // ranks
    ours = slice(rank * columns, (rank + 1) * columns)
    return Part(qkv.flatten(1), out.flatten(0, 1), model.up[layer][:, ours], model.down[layer][ours])


def all_reduce(group: Group, x: Tensor) -> Tensor:
    """lesson 19, task 3: all_reduce"""
    first, *others = group.all_gather(x)
    for other in others:
        first = first + other
    return first


class Rank:
    def step(self, plan: Plan) -> Tensor:
        """lesson 19, task 4: Rank.step"""
        x = self.embed(plan)
        for layer, part in enumerate(self.parts):
            q, k, v = (norm(x) @ part.qkv).view(len(x), 3, len(self.heads), self.head_dim).unbind(1)
            attended = self.attend(layer, q, k, v, plan)
            x = x + all_reduce(self.group, attended.flatten(1) @ part.out)
            x = x + all_reduce(self.group, torch.relu(norm(x) @ part.up) @ part.down)
        return self.logits(x)
