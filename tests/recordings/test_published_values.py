"""import-values: the published folders arrive whole, and bad files are refused by name and line."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from tests.published import VALUES, needs_values

from ttsnap.recordings import Recording
from ttsnap.recordings.published_values import import_values, read_values


def test_values_arrive_in_their_places(values: Path, tmp_path: Path) -> None:
    recording = import_values(values, tmp_path / "rec", prompts=["a", "b", "c", "d"])
    assert recording.shape == (3, 4, 5, 2)
    assert recording.rewards == ("hpsv2", "imagereward")
    assert recording.prompts == ("a", "b", "c")
    for reward, name in enumerate(("hps", "imr")):
        for step in range(5):
            rows = yaml.safe_load((values / f"flux_{name}_val_base/p3_i4_s{step:02d}.yaml").read_text())
            np.testing.assert_array_equal(recording.clean[:, :, step, reward], [rows[p] for p in range(3)])
    guide = recording.guide()
    np.testing.assert_array_equal(guide[:, :, :3], recording.clean[:, :, :3] + np.float32(10))
    np.testing.assert_array_equal(guide[:, :, 3:], recording.clean[:, :, 3:])  # falls back as the authors do
    np.testing.assert_array_equal(recording.guide("clean"), recording.clean)


def test_rewards_can_be_chosen_by_short_and_long_name(values: Path, tmp_path: Path) -> None:
    assert import_values(values, tmp_path / "rec", rewards=["imagereward", "hps"]).rewards == ("imagereward", "hpsv2")
    with pytest.raises(ValueError, match="no values of reward 'pic'; there are hps, imr"):
        import_values(values, tmp_path / "other", rewards=["pic"])


def test_a_model_must_be_chosen_among_several(values: Path, tmp_path: Path) -> None:
    shutil.copytree(values / "flux_hps_val_base", values / "sdxl_hps_val_base")
    with pytest.raises(ValueError, match="several models, choose one: flux, sdxl"):
        import_values(values, tmp_path / "rec")
    assert import_values(values, tmp_path / "rec", model="sdxl").shape == (3, 4, 5, 1)


def test_an_existing_recording_is_replaced_only_when_asked(values: Path, tmp_path: Path) -> None:
    import_values(values, tmp_path / "rec")
    with pytest.raises(ValueError, match="exists already"):
        import_values(values, tmp_path / "rec")
    import_values(values, tmp_path / "rec", overwrite=True)
    (tmp_path / "precious").mkdir()
    with pytest.raises(ValueError, match="not a ttsnap recording"):
        import_values(values, tmp_path / "precious", overwrite=True)


GOOD = "0:\n- 0.5\n- 1.5\n1:\n- 2.5\n- -3.0e-1\n"


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "1:\n- 2.5\n- -0.3\n0:\n- 0.5\n- 1.5\n",
        "{0: [0.5, 1.5], 1: [2.5, -0.3]}",
        "# rewards\n0: [0.5, 1.5]  # first\n1:\n  - 2.5\n  - -0.3\n",
        "---\n0:\n- 0.5\n- 1.5\n1:\n- 2.5\n- -0.3\n",
    ],
)
def test_any_plain_yaml_is_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p2_i2_s00.yaml"
    path.write_text(text)
    assert read_values(path, 2, 2).tolist() == [[0.5, 1.5], [2.5, -0.3]]


BAD = {
    "empty": ("", r"line 1: the file holds no values"),
    "truncated between prompts": ("0:\n- 0.5\n- 1.5\n", r"lacks prompt 1"),
    "truncated in a prompt": ("0:\n- 0.5\n- 1.5\n1:\n- 2.5\n", r"line 4: prompt 1 has 1 values.*2 images"),
    "truncated in a number": (GOOD[:-4], r"line 6: .*middle of a line"),
    "ragged": ("0:\n- 0.5\n- 1.5\n- 2.0\n1:\n- 2.5\n- 1.0\n", r"line 1: prompt 0 has 3 values"),
    "not a number": ("0:\n- 0.5\n- pretty\n1:\n- 2.5\n- 1.0\n", r"line 3: expected a number, got 'pretty'"),
    "quoted": ("0:\n- 0.5\n- '1.5'\n1:\n- 2.5\n- 1.0\n", r"line 3: expected a number"),
    "null": ("0:\n- 0.5\n-\n1:\n- 2.5\n- 1.0\n", r"line 3: expected a number"),
    "nan": ("0:\n- 0.5\n- nan\n1:\n- 2.5\n- 1.0\n", r"line 3: image 1 of prompt 0 has reward nan"),
    "inf": ("0:\n- 0.5\n- 1.0\n1:\n- -inf\n- 1.0\n", r"line 5: image 0 of prompt 1 has reward -inf"),
    "twice": ("0:\n- 0.5\n- 1.5\n0:\n- 2.5\n- 1.0\n", r"line 4: prompt 0 appears twice"),
    "twice in flow style": ("{0: [1, 2],\n0: [1, 2]}", r"line 2: prompt 0 appears twice"),
    "stray prompt": ("0:\n- 0.5\n- 1.5\n7:\n- 2.5\n- 1.0\n", r"line 4: prompt 7, but its name announces 2"),
    "a list": ("- 0.5\n- 1.5\n", r"line 1: expected a mapping"),
    "nested": ("0:\n- [1, 2]\n- 2\n", r"line 2: expected a mapping from prompt index to a list"),
    "text key": ("cat:\n- 0.5\n", r"line 1: expected a prompt index, got 'cat'"),
    "two documents": (GOOD + "---\n" + GOOD, r"line 8: expected|line 7: expected"),
    "broken": ("0: [1, 2\n1: }\n", r"line \d: "),
    "object": ("0:\n- !!python/object/apply:os.system ['touch owned']\n- 1\n", r"line 2: tags, anchors"),
    "object key": ("!!python/name:os.system 0:\n- 1\n- 2\n", r"line 1: tags, anchors"),
    "aliases": ("0: &a [1, 2]\n1: *a\n", r"line 1: tags, anchors"),
    "deep": ("[" * 200_000, r"line 1: expected a mapping|not valid YAML"),
    "deeper": ("0: " + "[" * 200_000, r"line 1: expected a mapping|not valid YAML"),
    "huge key": ("9" * 5000 + ":\n- 1\n", r"line 1: "),
    "control characters": ("0:\n- \x07\n", r"line \d: "),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_by_name_and_line(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, message = BAD[name]
    path = tmp_path / "p2_i2_s00.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_values(path, 2, 2)
    assert "p2_i2_s00.yaml" in str(caught.value)
    assert not (tmp_path / "owned").exists()


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p2_i2_s00.yaml"
    path.write_bytes(b"0:\n- \xff\xfe\n")
    with pytest.raises(ValueError, match=r"p2_i2_s00\.yaml is not text"):
        read_values(path, 2, 2)


def test_nothing_half_written_stays(values: Path, tmp_path: Path) -> None:
    bad = values / "flux_imr_val_naft" / "p3_i4_s02.yaml"
    bad.write_text(bad.read_text()[:-30])
    with pytest.raises(ValueError, match="p3_i4_s02"):
        import_values(values, tmp_path / "made" / "rec")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda v: (v / "flux_hps_val_base/p3_i4_s02.yaml").unlink(), "lacks step 02"),
        (lambda v: shutil.rmtree(v / "flux_hps_val_base"), "without clean rewards"),
        (lambda v: (v / "flux_hps_val_naft/p3_i5_s03.yaml").write_text("x"), "differ in their numbers"),
        (lambda v: (v / "flux_hps_val_naft/p3_i4_s09.yaml").write_text("x"), "no clean counterpart"),
        (lambda v: (v / "flux_hps_val_naft/p3_i4_s02.yml").write_text("x"), "the same step"),
        (lambda v: [shutil.rmtree(inner) for inner in v.iterdir()], "no value folders"),
    ],
)
def test_folders_that_do_not_fit_are_refused(values: Path, tmp_path: Path, damage: object, message: str) -> None:
    damage(values)  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        import_values(values, tmp_path / "rec")


@needs_values
def test_one_published_model_and_reward(tmp_path: Path) -> None:
    import_values(VALUES, tmp_path / "rec", rewards=["hps"])
    recording = Recording.open(tmp_path / "rec")
    assert recording.shape == (200, 200, 20, 1)
    assert recording.clean[0, 0, 0, 0] == np.float32(0.19526289403438568)
    assert np.isnan(recording.aware[:, :, 15:]).all()
    assert np.isfinite(recording.aware[:, :, :15]).all()
