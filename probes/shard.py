"""pytest -p shard with SHARD=i/n: slow files whole, of the others each test."""
import os, zlib
from collections import Counter
def pytest_collection_modifyitems(config, items):
    i, n = map(int, os.environ["SHARD"].split("/"))
    from conftest import NOT_QUICK
    where = lambda item: item.path.name if item.path.stem in NOT_QUICK else item.nodeid
    keep = [x for x in items if zlib.crc32(where(x).encode()) % n == i]
    drop = [x for x in items if zlib.crc32(where(x).encode()) % n != i]
    config.hook.pytest_deselected(items=drop); items[:] = keep
