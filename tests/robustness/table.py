# ruff: noqa: E501  (one row, one line)
"""The table in docs/robustness.md, made from the tests: python -m tests.robustness.table writes it."""

from __future__ import annotations

from pathlib import Path

from tests.robustness.cases import CASES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "robustness.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
SENTENCE = "one sentence, exit code 2"

# Cases that other tests cover: verb, what is given, what comes of it, file and test, and a text that stands in it.
ELSEWHERE = [
    ("generate", "an empty prompt", SENTENCE, "cli/test_generate.py::test_bad_input_is_one_sentence", "empty prompt"),
    ("generate", "an unknown model", SENTENCE, "cli/test_generate.py::test_bad_input_is_one_sentence", "unknown model"),
    ("generate", "broken JSON for prompts or policy", SENTENCE, "cli/test_generate.py::test_bad_files_are_one_sentence", "bad.json"),
    ("generate", "killed -9 at any moment", "goes on, ends with the same files", "cli/test_generate.py::test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_files", "SIGKILL"),
    ("generate", "a reward that returns NaN", "names prompt, seed and step", "live/test_engine.py::test_nan_names_prompt_seed_and_step", "nan for prompt"),
    ("generate", "a reward that returns another shape", "names reward and shape", "live/test_engine.py::test_a_reward_must_return_one_number_per_image", "must return one number per image"),
    ("generate, record, label", "a reward that fails for one prompt of many", "the others complete, exit code 3", "cluster/test_scheduling.py::test_a_reward_that_fails_for_one_prompt_costs_that_one_only", "raises"),
    ("generate, record, label", "Ctrl-C, and SIGTERM as a scheduler sends it", "one sentence, exit code 130; goes on", "cli/test_workers.py::test_an_interrupt_and_the_term_signal_of_a_scheduler_are_one_sentence", "SIGTERM"),
    ("generate, record, label", "a reward that prints", "on stderr; results stay alone on stdout", "cli/test_workers.py::test_what_a_reward_prints_stays_out_of_the_results", "chatty"),
    ("generate, record, label", "an output in an object store that another process is writing to", "one sentence that names the process", "files/test_locks.py::test_two_records_on_one_object_store_and_one_that_goes_on_after_a_kill", "is being written by process"),
    ("generate, record, label", "the lock in an object store of a process that was killed -9", "it is free after 60 s; the run goes on", "files/test_locks.py::test_in_an_object_store_an_owner_who_was_killed_blocks_the_next_for_six_heartbeats", "kill()"),
    ("generate, record, label", "several processes that start on an object store at the same moment", "one goes on; one sentence to the others", "files/test_locks.py::test_of_many_who_start_at_the_same_moment_one_gets_an_object_store", "same_moment"),
    ("generate, record, label", "an object store that ignores conditions of puts", "one warning", "files/test_locks.py::test_an_object_store_without_conditional_puts_is_told_of", "without conditional puts"),
    ("generate, record, label", "an owner of an object store's lock who was suspended for minutes", "one sentence, exit code 2", "files/test_locks.py::test_an_owner_who_slept_too_long_is_told_that_the_object_store_is_taken", "SIGSTOP"),
    ("generate", "a checkpoint of a reward that is a pickle", "refused; nothing in it is run", "rewards/test_clip.py::test_what_is_no_checkpoint_is_refused", "evil.pt"),
    ("generate", "a checkpoint that is cut off or of zeros", "refused by name", "rewards/test_clip.py::test_what_is_no_checkpoint_is_refused", "x.safetensors"),
    ("generate", "a checkpoint with keys that do not belong", "refused by name", "rewards/test_clip.py::test_every_key_is_accounted_for", "key"),
    ("generate", "a run of `train` of another version or damaged", "one sentence", "rewards/test_noise_aware.py::test_what_is_wrong_with_a_run_is_one_sentence", "version"),
    ("generate, record", "a decoder or denoiser that runs out of memory", "half batches, with a note", "live/test_engine.py::test_a_decoder_that_runs_out_of_memory_leaves_the_calls_their_batch", "at most 4 in a batch"),
    ("record", "killed -9 at any moment", "goes on, ends with the same files", "cli/test_record.py::test_killed_in_the_middle_it_goes_on_and_ends_with_the_same_files", "SIGKILL"),
    ("record", "a full disk", "one sentence; goes on when there is room", "cluster/test_ray.py::test_a_full_disk_stops_the_run_and_with_more_room_it_goes_on", "tmpfs"),
    ("record", "an object store that answers 503 for a while", "waits and completes", "cluster/test_ray.py::test_an_object_store_that_answers_503_for_a_while", "fail_for"),
    ("record", "workers killed -9 in mid-prompt", "the same files", "cluster/test_ray.py::test_workers_killed_in_the_middle_cost_nothing", "Killer"),
    ("record", "a prompt that kills every worker that tries it", "the others complete, exit code 3", "cluster/test_ray.py::test_a_prompt_that_kills_its_worker_is_found_and_the_rest_completes", "kills"),
    ("record", "images without a manifest in the output", SENTENCE, "recordings/test_image_tree.py::test_only_the_same_tree_is_gone_on_with", "holds images but no manifest"),
    ("record, label", "a manifest that is not JSON", SENTENCE, "recordings/test_image_tree.py::test_a_broken_manifest_is_one_sentence", "not JSON"),
    ("record, label", "a manifest of a later version", SENTENCE, "recordings/test_image_tree.py::test_a_broken_manifest_is_one_sentence", "a later version"),
    ("record, label", "a manifest with ragged seeds", SENTENCE, "recordings/test_image_tree.py::test_a_broken_manifest_is_one_sentence", "ragged seeds"),
    ("label", "an image cut off at any byte", "a bad image", "recordings/test_image_tree.py::test_every_cut_of_an_image_is_found", "png"),
    ("label", "an image that is empty, of another size, spoilt inside", "a bad image", "recordings/test_image_tree.py::test_faults_have_names", "is empty"),
    ("label", "one poisoned image among good ones", "its prompt is left out, exit code 3", "cluster/test_scheduling.py::test_a_poisoned_image_costs_its_prompt_only", "poison"),
    ("label", "published labels with an object", SENTENCE, "recordings/test_labelling.py::test_refused_labels_name_file_and_line", "an object"),
    ("label", "published labels with a tagged number", SENTENCE, "recordings/test_labelling.py::test_refused_labels_name_file_and_line", "a tagged number"),
    ("import-values", "values with object tags", SENTENCE, "recordings/test_published_values.py::test_a_bad_file_is_refused_by_name_and_line", "object"),
    ("import-values", "values with aliases", SENTENCE, "recordings/test_published_values.py::test_a_bad_file_is_refused_by_name_and_line", "aliases"),
    ("import-values", "values nested 200,000 deep", SENTENCE, "recordings/test_published_values.py::test_a_bad_file_is_refused_by_name_and_line", "deep"),
    ("import-values", "NaN or infinite values", SENTENCE, "recordings/test_published_values.py::test_a_bad_file_is_refused_by_name_and_line", "inf"),
    ("import-values", "bytes that are no text", SENTENCE, "recordings/test_published_values.py::test_bytes_that_are_no_text_are_refused", "text"),
    ("train", "killed -9 in the middle of a level", "goes on, the same weights", "training/test_loop.py::test_killed_in_the_middle_of_a_level_it_ends_the_same", "kill"),
    ("train", "a setting of the wrong kind or out of range", SENTENCE, "training/test_parts.py::test_a_bad_setting_is_one_sentence", "range"),
    ("simulate, tune", "a recording of another version", SENTENCE, "recordings/test_recording.py::test_a_damaged_recording_is_refused_in_one_sentence", "has version 99"),
    ("simulate, tune", "a recording that lacks an array, or has a damaged chunk", SENTENCE, "recordings/test_recording.py::test_a_damaged_recording_is_refused_in_one_sentence", "lacks its array"),
    ("simulate, tune", "a recording whose writer was killed", "what is whole is read", "recordings/test_recording.py::test_a_killed_writer_leaves_a_readable_recording", "kill"),
]  # fmt: skip


def rows() -> list[tuple[str, str, str, str]]:
    """Verb, what is given, what comes of it, and the test."""
    own = [(c.verb, c.given, c.outcome, f"robustness `{name}`") for name, c in CASES.items()]
    others = [(verb, given, outcome, test.split("::")[0]) for verb, given, outcome, test, _ in ELSEWHERE]
    return sorted(own + others, key=lambda row: row[0])


def render() -> str:
    """The table."""
    lines = ["| verb | given | what comes of it | test |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows()]
    return "\n".join(lines) + "\n"


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(before + BEGIN + render() + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
