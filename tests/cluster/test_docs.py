"""What docs/cluster.md tells to run is what is there: the Slurm script, and commands that ttsnap understands."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
SCRIPT = ROOT / "examples" / "slurm.sh"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def entrypoint():
    (job,) = (yaml.safe_load(block) for block in blocks("yaml"))
    assert job["kind"] == "RayJob"
    return job["spec"]["entrypoint"]


def slurm_command():
    """What the comment at the head of the script hands to ttsnap."""
    comment = " ".join(line.strip("#\\ ") for line in SCRIPT.read_text().splitlines()[2:4])
    return "ttsnap " + comment.split("slurm.sh ")[1] + " --ray-address 10.0.0.1:6379"


def test_the_page_shows_the_slurm_script_as_it_is():
    assert SCRIPT.read_text() in blocks("bash")
    subprocess.run(["bash", "-n", SCRIPT], check=True)


@pytest.mark.parametrize("command", [entrypoint, slurm_command])
def test_a_command_of_the_page_is_understood_up_to_where_it_wants_the_cluster(command, ttsnap, monkeypatch, tmp_path):
    words = shlex.split(command())
    assert words[0] == "ttsnap"
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    (tmp_path / "model").mkdir()
    places = {"prompts.txt": tmp_path / "prompts.txt", "found": tmp_path / "found", "tree": tmp_path / "tree"}
    words = [str(places.get(word.rsplit("/", 1)[-1], word)) for word in words[1:]]
    words = [str(tmp_path / "model") if word == "DIR" else word for word in words]

    class Wanted(Exception):
        pass

    def pool(workers, address):
        raise Wanted(workers, address)

    monkeypatch.setattr("ttsnap.cluster.ray_pool.RayPool", pool)
    with pytest.raises(Wanted) as wanted:
        ttsnap(*words)
    address = words[words.index("--ray-address") + 1]
    assert wanted.value.args == (int(words[words.index("--workers") + 1]), address)
