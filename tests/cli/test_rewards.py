"""`ttsnap rewards`: its table agrees with what loads, and needs nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys

from ttsnap import rewards
from ttsnap.rewards import sources
from ttsnap.rewards.catalogue import ENTRIES


def run(*arguments, forbidden=("torch", "transformers")):
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in forbidden)
    code = (
        f"import sys; {blocked}; from ttsnap.cli import main; sys.argv = {['ttsnap', 'rewards', *arguments]!r}; main()"
    )
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_it_lists_all_rewards_without_torch():
    data = json.loads(run("--json"))
    assert {entry["name"] for entry in data["rewards"]} == set(rewards.REWARDS)
    shown = run()
    assert all(name in shown for name in (*rewards.REWARDS, "module:function", "NAME=PATH"))


def test_it_says_where_weights_are(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))

    def cached(repo, *files):
        folder = tmp_path / f"models--{repo.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("abc")
        (place := folder / "snapshots" / "abc").mkdir(parents=True)
        for name in files:
            (place / name).touch()
        return place

    weights = cached("THUDM/ImageReward", "ImageReward.pt") / "ImageReward.pt"
    whole = cached(sources.VQASCORE.repo, "config.json", "model-00001-of-00002.safetensors")
    cached(sources.UNIFIEDREWARD.repo, "config.json")
    here = {entry["name"]: entry["here"] for entry in json.loads(run("--json"))["rewards"]}
    assert (here["imagereward"], here["pickscore"], here["shapes"]) == (str(weights), None, None)
    assert (here["vqascore"], here["unifiedreward"]) == (str(whole), None)


def test_it_names_what_is_loaded():
    listed = {entry.name: entry for entry in ENTRIES}
    assert sources.SOURCES.keys() == {name for name in listed if "shapes" not in name} - {"vlm"}
    for source in sources.SOURCES.values():
        entry = listed[source.reward]
        assert entry.weights.startswith(source.repo or "mps=FILE")
        if entry.tokenizer:
            assert entry.tokenizer == (source.tokenizer or sources.OPENAI)
        if source.files[0] not in (sources.CONFIG, "model.safetensors"):
            assert source.files[0] in entry.weights
    assert listed["aesthetic"].weights.endswith(sources.OPENAI)
