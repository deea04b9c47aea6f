"""A server reloads its indexes when their folders change."""

import asyncio
import gc
import shutil
import threading
import weakref

from llama_index_genret.models.prompts import Prompt
from llama_index_genret.scorers.base import recall
from llama_index_genret.scorers.fake import FakeScorer
from llama_index_genret.search import SearchOptions
from llama_index_genret.serving.endpoint.loaded_indexes import Registry
from llama_index_genret.store import RecordFilters, load_index, remove_images


def test_edit_is_read_once_for_all_waiting_callers(untrained_index, tmp_path, monkeypatch):
    """No caller gets a version older than its call. A read per caller would occupy threads that other routes need."""
    folder = tmp_path / "index"
    shutil.copytree(untrained_index.folder, folder)
    registry, read, readings = Registry({"index": folder}), Registry._read, []
    all_wait = threading.Event()

    def slowly(*args):
        readings.append(threading.active_count())
        loaded = read(*args)
        all_wait.wait()
        return loaded

    monkeypatch.setattr(Registry, "_read", slowly)

    async def call_during_edits():
        first = remove_images(load_index(folder), ["red-circle"]).version
        early = [asyncio.create_task(registry.current("index")) for _ in range(20)]
        while not readings:
            await asyncio.sleep(0.01)
        second = remove_images(load_index(folder), ["red-bar"]).version
        late = [asyncio.create_task(registry.current("index")) for _ in range(20)]
        await asyncio.sleep(0)
        late[0].cancel()
        all_wait.set()
        found = [loaded.version for loaded in await asyncio.gather(*early, *late[1:])]
        assert set(found[:20]) <= {first, second}
        assert set(found[20:]) == {second}

    asyncio.run(call_during_edits())
    assert len(readings) == 2
    assert max(readings) - min(readings) <= 1


def test_old_version_is_freed_after_its_last_search(untrained_index, tmp_path):
    """This needs no garbage collection. Its files are memory-mapped, so that edits would otherwise accumulate maps."""
    folder = tmp_path / "index"
    shutil.copytree(untrained_index.folder, folder)
    gc.collect()
    gc.disable()
    try:
        registry = Registry({"index": folder})
        loaded = registry.get("index")
        filters = RecordFilters.model_validate({"filters": [{"key": "color", "operator": "!=", "value": "x"}]})
        leaves = loaded.leaf_filter(filters)
        scorer = FakeScorer(loaded.index.tokenizer.vocab_size)
        assert recall(scorer, loaded.index.trie, [Prompt((5,))], SearchOptions(k=3, leaf_filter=leaves))
        older = [weakref.ref(loaded), weakref.ref(loaded.index), weakref.ref(loaded.index.trie)]
        remove_images(load_index(folder), ["red-circle"])
        registry.get("index")
        assert all(part() for part in older)
        del loaded, leaves
        assert not any(part() for part in older)
    finally:
        gc.enable()
