"""Paged memory in pure Python: block tables, reference counts, copy-on-write, the prefix cache and the host tier."""

from minipaged.memory.block_manager import BlockManager
from minipaged.memory.blocks import PrefixHit
from minipaged.memory.types import NULL_BLOCK, Admission, Allocation, BlockEvent, PoolUsage

__all__ = ["NULL_BLOCK", "Admission", "Allocation", "BlockEvent", "BlockManager", "PoolUsage", "PrefixHit"]
