"""`ttsnap rewards`: its table agrees with what loads, and needs nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys

from ttsnap import rewards
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
    folder = tmp_path / "models--THUDM--ImageReward"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    weights = folder / "snapshots" / "abc" / "ImageReward.pt"
    weights.touch()
    here = {entry["name"]: entry["here"] for entry in json.loads(run("--json"))["rewards"]}
    assert (here["imagereward"], here["pickscore"], here["shapes"]) == (str(weights), None, None)


def test_it_names_what_is_loaded():
    from ttsnap.rewards import blip, clip, hpsv3, mps, unifiedreward, vqascore
    from ttsnap.rewards import sources as known

    listed = {entry.name: entry for entry in ENTRIES}
    sources = (clip.PICKSCORE, clip.HPSV2, clip.HPSV21, clip.CLIPSCORE, clip.AESTHETIC, blip.IMAGEREWARD, hpsv3.HPSV3)
    for source in sources:
        assert listed[source.reward].weights.startswith(source.repo)
        if listed[source.reward].tokenizer:
            assert listed[source.reward].tokenizer == source.tokenizer
    for name in ("imagereward", "hpsv2", "hpsv2.1", "aesthetic", "hpsv3"):
        (file,) = next(source.files for source in sources if source.reward == name)
        assert file in listed[name].weights
    assert listed["aesthetic"].weights.endswith(known.OPENAI)
    assert mps.MPS_SOURCE.files[0] in listed["mps"].weights
    assert listed["mps"].tokenizer == mps.MPS_SOURCE.tokenizer
    assert listed["vqascore"].weights.startswith(vqascore.MODEL)
    assert listed["unifiedreward"].weights.startswith(unifiedreward.MODEL)
