"""Tokenizers of every kind, made small here: byte-level and SentencePiece, from folders and from GGUF metadata, and bytes."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from minipaged.api import LLM
from minipaged.config import SamplingParams
from minipaged.errors import ModelError, RequestError
from minipaged.model.loading.gguf_tokenizer import build_tokenizer
from minipaged.model.loading.subword_tokenizer import folder_tokenizer, gguf_tokenizer
from minipaged.model.loading.tokenizer import ByteTokenizer, Tokenizer
from tests.model.tiny import CONFIGS, make_model
from tests.model.tiny_gguf import byte_letters, write_gguf

CORPUS = ["the cat sat on the mat and the hat", "hello world, hello there", "übung macht den meister", "1 2 3 go"] * 5
SOURCE = Path("somewhere.gguf")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A byte-level tokenizer that puts a BOS before a text, as Llama 3's does."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=["<s>", "</s>", "<unk>"], initial_alphabet=alphabet)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["<think>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_folder(folder: Path) -> None:
    tokenizer = folder_tokenizer(folder)
    text = "the übung, hello 🙂 " * 3
    tokens = tokenizer.encode(text)
    assert tokens[0] == tokenizer.bos_token_id == 0
    assert tokens[1:] == tokenizer.encode(text, add_special=False)
    assert len(tokens) > 4, "a truncation kept in the file is not for prompts"
    assert tokenizer.decode(tokens) == text
    assert tokenizer.decode(tokens, skip_special=False) == "<s>" + text
    assert tokenizer.eos_token_ids == (1,)
    assert folder_tokenizer(folder, (7, 8)).eos_token_ids == (7, 8)


def test_special_and_added_tokens(folder: Path) -> None:
    tokenizer = folder_tokenizer(folder)
    think = tokenizer.encode("<think>", add_special=False)
    assert len(think) == 1
    assert tokenizer.token_bytes(think[0]) == b"<think>", "an added token that is not special is text"
    assert tokenizer.encode("a</s>", add_special=False)[-1] == 1
    assert 1 not in tokenizer.encode("a</s>", add_special=False, parse_special=False)


def test_chat_template_from_each_place(folder: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    assert folder_tokenizer(folder).chat(messages) == "<user>Hi<bot>"
    assert folder_tokenizer(folder).chat(messages, add_generation_prompt=False) == "<user>Hi"
    edit_config(folder, chat_template=[{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}])
    assert folder_tokenizer(folder).chat(messages) == "D"
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}")
    assert folder_tokenizer(folder).chat(messages) == "<s>Hi</s>"


def test_no_chat_template(folder: Path) -> None:
    edit_config(folder, chat_template=None)
    with pytest.raises(ModelError, match="no chat template"):
        folder_tokenizer(folder).chat([{"role": "user", "content": "Hi"}])


def test_templates_may_use_what_published_ones_use(folder: Path) -> None:
    source = (
        "{%- for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}\n"
        "    {%- generation %}{{ m | tojson }}{% endgeneration %}\n{% endfor %}{{ strftime_now('%Y') | length }}"
    )
    edit_config(folder, chat_template=source)
    messages = [{"role": "user", "content": "<é>"}] * 3
    one = '{"role": "user", "content": "<é>"}'
    assert folder_tokenizer(folder).chat(messages) == f"{one}{one}4"
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), chat_template=source
    )
    assert reference.apply_chat_template(messages, tokenize=False) == f"{one}{one}4"


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[9].content.upper() }}", "messages"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ ''.__class__.__mro__ }}", "__class__"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range"),
    ],
)
def test_a_template_that_fails_is_one_line(folder: Path, source: str, word: str) -> None:
    edit_config(folder, chat_template=source)
    with pytest.raises(RequestError, match="chat template") as caught:
        folder_tokenizer(folder).chat([{"role": "user", "content": "Hi"}])
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_that_does_not_compile(folder: Path) -> None:
    edit_config(folder, chat_template="{% for %}")
    with pytest.raises(ModelError, match="does not compile"):
        folder_tokenizer(folder)


@pytest.mark.parametrize(
    "messages",
    [[], "Hi", None, [1], [{}], [{"role": "user"}], [{"role": "user", "content": None}], [{"role": 1, "content": "x"}]],
    ids=repr,
)
def test_messages_that_are_none(folder: Path, messages: Any) -> None:
    with pytest.raises(RequestError, match="messages"):
        folder_tokenizer(folder).chat(messages)


def test_folders_without_a_tokenizer_that_can_be_read(folder: Path) -> None:
    path = folder / "tokenizer.json"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"tokenizer\.json: not a tokenizer"):
        folder_tokenizer(folder)
    values = json.loads(whole) | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}
    path.write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"WordPiece.*ByteLevel"):
        folder_tokenizer(folder)
    path.unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        folder_tokenizer(folder)


@pytest.mark.parametrize("text", [None, b"bytes", 5, "half \ud83d of a pair"], ids=repr)
def test_prompts_that_are_no_text(folder: Path, text: Any) -> None:
    for tokenizer in (folder_tokenizer(folder), ByteTokenizer()):
        with pytest.raises(RequestError, match="prompt"):
            tokenizer.encode(text)


def sentencepiece_metadata() -> dict[str, Any]:
    """A vocabulary like Llama 2's: unknown, BOS, EOS, 256 bytes, then pieces with falling scores."""
    words = {piece for text in CORPUS for word in text.split() for piece in pieces_of("▁" + word)}
    letters = sorted({letter for text in CORPUS for letter in text.replace(" ", "▁")})
    longer = sorted(words - set(letters), key=lambda piece: (len(piece), piece))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *longer, *letters]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(longer) + len(letters))]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(longer) + len(letters))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def pieces_of(word: str) -> list[str]:
    return [word[:end] for end in range(2, len(word) + 1)] + [word[start:] for start in range(1, len(word) - 1)]


def test_sentencepiece_equals_transformers(tmp_path: Path) -> None:
    metadata = sentencepiece_metadata()
    config = type(CONFIGS["gqa"])(**(CONFIGS["gqa"].to_dict() | {"vocab_size": len(metadata["tokenizer.ggml.tokens"])}))
    write_gguf(tmp_path / "spm.gguf", make_model(config), metadata=metadata, drop=("tokenizer.ggml.merges",))
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="spm.gguf")
    tokenizer = gguf_tokenizer(metadata, SOURCE)
    rng = random.Random(0)
    words = sorted({word for text in CORPUS for word in text.split()})
    texts = [
        " ".join(rng.choice([*words, "zebra", "🙂", "über", ""]) for _ in range(rng.randint(1, 8))) for _ in range(100)
    ]
    for text in (*CORPUS[:4], "hello", " hello", "the  cat\n", *texts):
        tokens = tokenizer.encode(text)
        assert tokens == reference(text)["input_ids"], text
        assert tokenizer.decode(tokens) == reference.decode(tokens, skip_special_tokens=True)


def test_sentencepiece_bytes() -> None:
    tokenizer = gguf_tokenizer(sentencepiece_metadata(), SOURCE)
    tokens = tokenizer.encode("hello 🙂 the", add_special=False)
    assert b"".join(map(tokenizer.token_bytes, tokens)) == " hello 🙂 the".encode()
    assert tokenizer.decode(tokens) == "hello 🙂 the"
    assert tokenizer.encode("hello")[0] == tokenizer.bos_token_id == 1


def byte_level_metadata(pre: str) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*byte_letters(), "12", "123", "1234", "Ġ1", "<|end|>", "<tool>"],
        "tokenizer.ggml.token_type": [1] * 260 + [3, 4],
        "tokenizer.ggml.merges": ["1 2", "12 3", "123 4", "Ġ 1"],
        "tokenizer.ggml.eos_token_id": 260,
    }


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["1234", "5", "Ġ", "12"]),
        ("llama-bpe", ["123", "4", "5", "Ġ", "12"]),
        ("qwen2", ["1", "2", "3", "4", "5", "Ġ", "1", "2"]),
        ("smollm", ["1", "2", "3", "4", "5", "Ġ", "1", "2"]),
    ],
)
def test_pre_tokenizers_cut_digits_each_in_its_way(pre: str, pieces: list[str]) -> None:
    metadata = byte_level_metadata(pre)
    vocab = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    assert gguf_tokenizer(metadata, SOURCE).encode("12345 12") == [vocab[piece] for piece in pieces]


def test_control_tokens_are_special_and_user_defined_ones_are_text() -> None:
    tokenizer = gguf_tokenizer(byte_level_metadata("smollm"), SOURCE)
    assert tokenizer.encode("a<|end|><tool>")[1:] == [260, 261]
    assert tokenizer.token_bytes(260) == b""
    assert tokenizer.token_bytes(261) == b"<tool>"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer.ggml.model": "bert"}, r"'bert'.*gpt2.*llama"),
        ({"tokenizer.ggml.model": None}, r"None.*gpt2"),
        ({"tokenizer.ggml.pre": "chatglm-bpe"}, r"'chatglm-bpe'.*smollm"),
        ({"tokenizer.ggml.tokens": None}, r"tokenizer\.ggml\.tokens"),
        ({"tokenizer.ggml.merges": []}, r"tokenizer\.ggml\.merges"),
        ({"tokenizer.ggml.merges": ["1 nowhere"]}, r"merges do not fit"),
        ({"tokenizer.ggml.model": "llama"}, r"tokenizer\.ggml\.scores"),
        ({"tokenizer.ggml.add_bos_token": True}, r"bos_token_id is missing"),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 999}, r"bos_token_id.*999"),
    ],
)
def test_gguf_tokenizers_that_cannot_be_built(change: dict[str, Any], words: str) -> None:
    metadata = {key: value for key, value in (byte_level_metadata("smollm") | change).items() if value is not None}
    with pytest.raises(ModelError, match=words):
        build_tokenizer(metadata, SOURCE)


def test_bytes() -> None:
    tokenizer: Tokenizer = ByteTokenizer(300)
    for text in ("", "plain", "äöü 🙂 中文\x00"):
        tokens = tokenizer.encode(text)
        assert tokens == list(text.encode())
        assert tokenizer.decode(tokens) == text
    assert tokenizer.decode([104, 105, 256]) == "hi"
    assert tokenizer.decode([0xC3]) == "\ufffd"
    assert tokenizer.decode([299]) == "<299>"
    assert tokenizer.token_bytes(300) == tokenizer.token_bytes(-1) == b""
    with pytest.raises(ModelError, match="257"):
        ByteTokenizer(100)


def against_transformers(folder: Path, *texts: str) -> None:
    edit_config(folder, bos_token="<s>")
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer = folder_tokenizer(folder)
    for text in texts:
        assert tokenizer.encode(text) == reference(text)["input_ids"], text
        tokens = tokenizer.encode(text, add_special=False)
        assert tokens == reference(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(tokens) == reference.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("silent", [True, False])
@pytest.mark.parametrize(("bos", "eos"), [(True, True), (True, False), (False, True), (False, False), (None, True)])
def test_bos_and_eos_around_a_text(
    folder: Path, bos: bool | None, eos: bool | None, silent: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """tokenizer.json has the last word, as in transformers 5; where the flags say something else, a line is logged."""
    fields = {"add_bos_token": bos, "add_eos_token": eos}
    edit_config(folder, **{name: value for name, value in fields.items() if value is not None})
    if silent:
        path = folder / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    against_transformers(folder, "hello there", "")
    tokens = folder_tokenizer(folder).encode("hello")
    assert (tokens[0] == 0, tokens[-1] == 1) == (not silent, False)
    assert ("add_bos_token is" in caplog.text) == (bos is silent)
    assert ("add_eos_token is" in caplog.text) == (eos is True)


def test_tokens_that_only_the_config_lists(folder: Path) -> None:
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    size = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    listed = {str(size): {"content": "<|tool|>", "special": True, **flags}}
    listed[str(size - 1)] = {"content": "<think>", "special": True, **flags}
    edit_config(folder, added_tokens_decoder=listed)
    against_transformers(folder, "a<|tool|>b", "<think>c")
    assert folder_tokenizer(folder).encode("<|tool|>", add_special=False) == [size]
    assert folder_tokenizer(folder).token_bytes(size - 1) == b"", "special, as the config has it"
    edit_config(folder, added_tokens_decoder={"900": listed[str(size)]})
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: added_tokens_decoder.*<\|tool\|>.*900"):
        folder_tokenizer(folder)
    for wrong in ([], {"x": {}}, {"900": "text"}, {"900": {"content": 5}}):
        edit_config(folder, added_tokens_decoder=wrong or [1])
        with pytest.raises(ModelError, match="added_tokens_decoder"):
            folder_tokenizer(folder)


@pytest.mark.parametrize(
    "listed",
    [
        {"additional_special_tokens": ["<think>", "the"]},
        {"additional_special_tokens": [{"__type": "AddedToken", "content": "<think>", "special": True}]},
        {"extra_special_tokens": {"think_token": "<think>"}},
        {"extra_special_tokens": ["the"]},
        {"model_specific_special_tokens": {"think_token": "<think>"}},
        {"extra_special_tokens": None, "additional_special_tokens": []},
    ],
)
def test_tokens_that_the_config_calls_special(folder: Path, listed: dict[str, Any]) -> None:
    """A text is cut at them and an answer leaves them out, also where tokenizer.json holds them as ordinary ones."""
    edit_config(folder, **listed)
    against_transformers(folder, "a<think>b", "hello there, othello", "say hellohello")


@pytest.mark.parametrize("listed", [["<|nowhere|>"], [5], 7, [""], {"x": None}])
@pytest.mark.parametrize("name", ["additional_special_tokens", "extra_special_tokens"])
def test_special_tokens_that_are_none_are_refused(folder: Path, name: str, listed: Any) -> None:
    edit_config(folder, **{name: listed})
    with pytest.raises(ModelError, match=rf"tokenizer_config\.json: {name}"):
        folder_tokenizer(folder)


def test_names_that_only_the_special_tokens_map_gives(folder: Path) -> None:
    template = "{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"}))
    tokenizer = folder_tokenizer(folder)
    assert tokenizer.chat([{"role": "user", "content": "Hi"}]) == "<s>Hi</s>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (0, (1,))


def test_an_end_that_is_no_token_is_refused(folder: Path) -> None:
    edit_config(folder, eos_token="<|nowhere|>")
    with pytest.raises(ModelError, match=r"eos_token is '<\|nowhere\|>', which is no token"):
        folder_tokenizer(folder)


def test_a_rendered_chat_gets_no_second_bos(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_config(folder, chat_template="{{ bos_token }}{{ messages[0]['content'] }}")
    tokenizer = folder_tokenizer(folder)
    text = tokenizer.chat([{"role": "user", "content": "hello"}])
    assert tokenizer.encode(text) == tokenizer.encode(text, add_special=False) == tokenizer.encode("hello")
    assert tokenizer.encode(text)[:2] != [0, 0]
    assert [record.message.count("second one is left out") for record in caplog.records] == [1], "said once"
    assert tokenizer.encode(text, parse_special=False)[1] != 0, "plain characters stay plain characters"


def test_a_bos_that_the_pre_tokenizer_implies(caplog: pytest.LogCaptureFixture) -> None:
    """llama.cpp: texts of the Llama 3 and Tekken kinds begin with the BOS unless the file says otherwise."""
    for pre in ("llama-bpe", "tekken"):
        metadata = byte_level_metadata(pre) | {"tokenizer.ggml.bos_token_id": 260}
        assert gguf_tokenizer(metadata, SOURCE).encode("1")[0] == 260
        metadata["tokenizer.ggml.add_bos_token"] = False
        assert gguf_tokenizer(metadata, SOURCE).encode("1")[0] != 260
    metadata = byte_level_metadata("qwen2") | {"tokenizer.ggml.bos_token_id": 260}
    assert gguf_tokenizer(metadata, SOURCE).encode("1")[0] != 260
    assert caplog.records == []
    gguf_tokenizer(byte_level_metadata("llama-bpe"), SOURCE)
    assert "bos_token_id is missing" in caplog.text


def test_an_eos_that_the_file_wants_behind_a_text() -> None:
    metadata = byte_level_metadata("smollm") | {"tokenizer.ggml.add_eos_token": True}
    assert gguf_tokenizer(metadata, SOURCE).encode("1")[-1] == 260
    assert gguf_tokenizer(metadata, SOURCE).encode("1", add_special=False)[-1] != 260


def test_a_missing_pre_tokenizer_is_said_and_llama_cpps_default_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    metadata = byte_level_metadata("default")
    vocab = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    expected = [vocab[piece] for piece in ("123", "4", "5", "Ġ", "12")]  # runs of digits, then threes
    assert gguf_tokenizer(metadata, SOURCE).encode("12345 12") == expected
    assert caplog.records == []
    del metadata["tokenizer.ggml.pre"]
    assert gguf_tokenizer(metadata, SOURCE).encode("12345 12") == expected
    assert "somewhere.gguf: tokenizer.ggml.pre is missing" in caplog.text


def test_sentencepiece_ids_by_tradition() -> None:
    metadata = sentencepiece_metadata()
    for kind in ("bos", "eos", "unknown"):
        del metadata[f"tokenizer.ggml.{kind}_token_id"]
    tokenizer = gguf_tokenizer(metadata, SOURCE)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2,))
    assert tokenizer.encode("hello")[0] == 1


# ---- how long a text is at least


@pytest.mark.parametrize(
    "text", ["the cat", "e\u0301" * 40, " " * 500, "hello" * 90, "ü🙂" * 50, "\n\t 1 2 3" * 30, "</s>" * 70]
)
def test_a_text_has_at_least_the_tokens_that_are_promised(folder: Path, text: str) -> None:
    tokenizer = folder_tokenizer(folder)
    for count in (1, 50):
        assert tokenizer.fewest_tokens(text * count) <= len(tokenizer.encode(text * count, add_special=False))


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": ""}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"String": "a"}, "behavior": "Removed", "invert": False}},
    ],
)
def test_where_a_tokenizer_may_drop_text_nothing_is_promised(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert folder_tokenizer(folder).fewest_tokens("a" * 100_000) == 0


def test_a_prompt_of_100_megabytes_is_refused_at_once(folder: Path) -> None:
    """Its tokens are never made: that takes the better part of a minute."""
    llm = LLM("toy", num_blocks=64)
    llm.engine.codec = folder_tokenizer(folder)
    text = "hello there " * (100_000_000 // 12)
    start = time.process_time()
    with pytest.raises(
        RequestError, match=r"99,999,996 characters, which are at least [\d,]+ tokens; .* context holds"
    ):
        llm.generate(text)
    assert time.process_time() - start < 8
    assert llm.generate([1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True))[0].finished
