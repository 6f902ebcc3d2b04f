"""The planted bugs. `old` occurs exactly once in `file`; `tests` fail if it is replaced by `new`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Bug:
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


FILES, MANIFEST, RESUME = "gptpipe/base/files.py", "gptpipe/base/manifest.py", "gptpipe/base/resume.py"
LOOP, CHECKPOINT = "gptpipe/train/loop.py", "gptpipe/train/checkpoint.py"
SESSION, BATCHES, GPT = "gptpipe/train/session.py", "gptpipe/train/batches.py", "gptpipe/model/gpt.py"
BUGS = (
    # Files
    Bug(
        "a file is renamed before it is on disk",
        FILES,
        "                file.flush()\n                os.fsync(file.fileno())\n",
        "                file.flush()\n",
        ("tests/base/test_files.py::test_a_file_is_on_disk_before_it_gets_its_name",),
    ),
    Bug(
        "the name of a file is not made durable",
        FILES,
        "            partial.replace(path)\n            sync_folder(path.parent)\n",
        "            partial.replace(path)\n",
        ("tests/base/test_files.py::test_a_file_is_on_disk_before_it_gets_its_name",),
    ),
    Bug(
        "a file is written under its final name",
        FILES,
        '            with partial.open("wb") as file:\n                yield file\n',
        '            with path.open("wb") as file:\n                yield file\n                partial.touch()\n',
        ("tests/base/test_files.py::test_an_aborted_write_keeps_the_old_file",),
    ),
    Bug(
        "the digest of a file is not compared",
        MANIFEST,
        "path.stat().st_size != entry.n_bytes or sha256_of(path) != entry.sha256",
        "path.stat().st_size != entry.n_bytes",
        ("tests/base/test_manifest.py::test_every_flipped_bit_is_detected",),
    ),
    Bug(
        "files that the manifest does not name are not seen",
        MANIFEST,
        "present.symmetric_difference(manifest.files)",
        "set(manifest.files) - present",
        ("tests/base/test_manifest.py::test_truncated_missing_and_added_files_are_detected",),
    ),
    Bug(
        "the seal of a manifest is not checked",
        FILES,
        "    if not is_unchanged:\n",
        "    if False:\n",
        ("tests/base/test_manifest.py::test_every_change_of_a_manifest_is_detected",),
    ),
    Bug(
        "two processes may write one folder",
        "gptpipe/shell/locks.py",
        "            lock.acquire(timeout=_LOCK_SECONDS)\n",
        "            pass\n",
        ("tests/shell/test_locks.py::test_a_second_writer_stops_within_seconds_and_names_the_first",),
    ),
    Bug(
        "leftovers of a kill are hashed as content",
        MANIFEST,
        "                _remove(leftover)\n",
        "                pass\n",
        ("tests/base/test_manifest.py::test_leftovers_of_a_killed_build_are_not_content",),
    ),
    Bug(
        "the old folder is removed before the new one is complete",
        MANIFEST,
        "                _finish_folder(folder, made_from)\n",
        "                _remove(target)\n                _finish_folder(folder, made_from)\n",
        ("tests/base/test_manifest.py::test_a_folder_is_complete_after_a_kill_at_any_time",),
    ),
    Bug(
        "records of finished files stay in the folder",
        RESUME,
        "        record.unlink()\n",
        "        pass\n",
        ("tests/base/test_resume.py::test_records_of_finished_files_are_not_content",),
    ),
    Bug(
        "finished files count although they changed",
        RESUME,
        'if record["files"] == [sha256_of(path) for path in files]:',
        "if record:",
        (
            "tests/collect/test_collect.py::test_after_a_kill_finished_shards_are_kept",
            "tests/tokenize/test_encode.py::test_after_a_kill_finished_shards_are_kept",
        ),
    ),
    Bug(
        "a stale parent is not noticed",
        MANIFEST,
        "if read_manifest(folder).made_from.get(parent.name) != read_manifest(parent).digest:",
        "if read_manifest(folder).made_from.get(parent.name) is None:",
        ("tests/base/test_manifest.py::test_a_folder_made_from_another_parent_is_rejected",),
    ),
    Bug(
        "rows are not compared with the counts",
        "gptpipe/base/parquet.py",
        "if n_rows != manifest.counts.get(name):",
        "if n_rows < 0:",
        ("tests/base/test_parquet.py::test_rows_that_the_manifest_does_not_count_are_detected",),
    ),
    Bug(
        "Parquet pages are read without their checksums",
        "gptpipe/base/parquet.py",
        "with pq.ParquetFile(path, page_checksum_verification=True) as file:",
        "with pq.ParquetFile(path) as file:",
        ("tests/base/test_parquet.py",),
    ),
    # Collect
    Bug(
        "the journal of the tally is not replayed after a kill",
        "gptpipe/collect/collect.py",
        '        tally.restore(done["result"])\n',
        "",
        ("tests/collect/test_collect.py::test_after_a_kill_finished_shards_are_kept",),
    ),
    Bug(
        "dedup forgets the documents before a kill",
        "gptpipe/collect/collect.py",
        '            seen.add(strings(batch, "id"))\n            progress',
        "            progress",
        ("tests/collect/test_collect.py::test_after_a_kill_finished_shards_are_kept",),
    ),
    Bug(
        "dedup forgets its recent documents when it merges them",
        "gptpipe/collect/dedup.py",
        "            self._older = _merged(self._older, self._recent)\n",
        "",
        ("tests/collect/test_dedup.py::test_seen_ids_are_found_in_any_order",),
    ),
    Bug(
        "a rejected document is not counted",
        "gptpipe/collect/tally.py",
        "        self.add(source, name, 1)\n",
        "        self.by_source[source][name] += 1\n",
        ("tests/collect/test_collect.py::test_documents_in_are_kept_plus_rejected_by_reason",),
    ),
    Bug(
        "cleaning keeps a second byte order mark",
        "gptpipe/collect/cleaning.py",
        'text = text.lstrip("\\n\\ufeff").rstrip("\\n")',
        'text = text.strip("\\n")',
        ("tests/properties/test_text.py",),
    ),
    Bug(
        "a piece of a long document may be one character too long",
        "gptpipe/collect/cleaning.py",
        "        end = min(max_bytes, len(encoded))\n",
        "        end = min(max_bytes + 1, len(encoded))\n",
        ("tests/properties/test_text.py::test_cutting_loses_nothing_and_respects_the_limit",),
    ),
    # Tokens
    Bug(
        "sides depend on the neighbours of a document",
        "gptpipe/formats/sides.py",
        "    side = np.where(position > 1",
        "    position = (position + np.arange(len(position)) * 0.01) % 1\n    side = np.where(position > 1",
        ("tests/properties/test_documents.py::test_a_side_depends_only_on_the_document_and_the_seed",),
    ),
    Bug(
        "more validation takes documents from test",
        "gptpipe/formats/sides.py",
        "position > 1 - fractions.val",
        "position < fractions.val + fractions.test",
        ("tests/formats/test_sides.py::test_more_test_takes_documents_only_from_train",),
    ),
    Bug(
        "the tokenizer is trained on all documents",
        "gptpipe/tokenize/encode.py",
        "pa.array(is_train & is_chosen)",
        "pa.array(is_chosen)",
        ("tests/tokenize/test_encode.py::test_words_of_val_and_test_alone_do_not_shape_the_vocabulary",),
    ),
    Bug(
        "windows end one token early",
        BATCHES,
        "self._last_start = len(tokens) - context_length - 1",
        "self._last_start = len(tokens) - context_length - 2",
        ("tests/train/test_batches.py", "tests/properties/test_order.py"),
    ),
    Bug(
        "the last window is not moved back",
        BATCHES,
        "        return np.minimum(starts, self._last_start)\n",
        "        return np.where(starts > self._last_start, 0, starts)\n",
        ("tests/properties/test_order.py::test_windows_cover_the_stream_once_per_epoch",),
    ),
    Bug(
        "targets are the tokens themselves",
        BATCHES,
        "window_tensor[:, 1:].contiguous()",
        "window_tensor[:, :-1].contiguous()",
        ("tests/train/test_batches.py::test_targets_are_the_next_tokens",),
    ),
    Bug(
        "each epoch has the same order",
        BATCHES,
        'f"{self.seed}:{epoch}"',
        'f"{self.seed}"',
        ("tests/train/test_batches.py::test_every_window_once_per_epoch_and_batches_cross_epochs",),
    ),
    Bug(
        "a token stream's offsets ignore the batches before",
        "gptpipe/formats/streams.py",
        'offset = self.counts["tokens"] + n_tokens.cumsum() - n_tokens',
        "offset = n_tokens.cumsum() - n_tokens",
        ("tests/formats/test_streams.py",),
    ),
    Bug(
        "ranks train on the same part of the batch",
        "gptpipe/train/distributed.py",
        "return slice(rank * n, (rank + 1) * n)",
        "return slice(0, n)",
        ("tests/properties/test_order.py::test_ranks_divide_each_batch",),
    ),
    # Model and metrics
    Bug(
        "a document sees the documents before it",
        GPT,
        "    return same.tril()\n",
        "    return same | same.tril().logical_not().tril()\n",
        ("tests/model/test_gpt.py::test_with_document_masking_each_document_is_scored_as_if_alone",),
    ),
    Bug(
        "the causal mask is missing where documents are masked",
        GPT,
        "    return same.tril()\n",
        "    return same\n",
        ("tests/model/test_gpt.py::test_with_document_masking_each_document_is_scored_as_if_alone",),
    ),
    Bug(
        "the metric leaves out a token between windows",
        "gptpipe/score/scoring.py",
        "    n_targets = max(0, len(stream.tokens) - 1)\n",
        "    n_targets = max(0, len(stream.tokens) - 2)\n",
        ("tests/score/test_scoring.py::test_against_a_loop",),
    ),
    Bug(
        "a token is scored for the document before its own",
        "gptpipe/score/scoring.py",
        'np.searchsorted(ends, np.arange(start + 1, end + 1), side="right")',
        'np.searchsorted(ends, np.arange(start, end), side="right")',
        ("tests/score/test_scoring.py::test_against_a_loop",),
    ),
    # Training
    Bug(
        "the generator is not restored",
        CHECKPOINT,
        '    torch.set_rng_state(tensors["generator.cpu"])\n',
        "",
        ("tests/train/test_checkpoint.py",),
    ),
    Bug(
        "the optimizer's state is not restored",
        CHECKPOINT,
        "        updates[parameter].state[parameter] = {key",
        "        _ = {key",
        ("tests/train/test_checkpoint.py::test_a_restored_training_continues_bit_for_bit",),
    ),
    Bug(
        "a checkpoint is used without a check",
        CHECKPOINT,
        "        verify(folder)\n        path = folder / _STATE\n",
        "        path = folder / _STATE\n",
        ("tests/train/test_checkpoint.py::test_a_damaged_checkpoint_is_detected_and_the_previous_one_is_used",),
    ),
    Bug(
        "a resumed training repeats its last step",
        CHECKPOINT,
        "state.step, state.skipped = self.content.step, ",
        "state.step, state.skipped = self.content.step - 1, ",
        ("tests/train/test_checkpoint.py::test_a_restored_training_continues_bit_for_bit",),
    ),
    Bug(
        "another environment resumes without a word",
        CHECKPOINT,
        "if different and not allow_inexact:",
        "if False:",
        ("tests/train/test_checkpoint.py::test_another_environment_is_refused_unless_allowed",),
    ),
    Bug(
        "the best weights of a kept checkpoint are removed",
        CHECKPOINT,
        "for content in kept if content.best_step is not None}",
        "for content in kept[-1:] if content.best_step is not None}",
        ("tests/train/test_checkpoint.py::test_two_steps_are_kept_and_the_best_of_each",),
    ),
    Bug(
        "the best model is the one with the highest loss",
        "gptpipe/train/state.py",
        "return min(self.history, key=lambda validation: validation.val_loss, default=None)",
        "return max(self.history, key=lambda validation: validation.val_loss, default=None)",
        ("tests/train/test_loop.py", "tests/train/test_checkpoint.py"),
    ),
    Bug(
        "the learning rate is one step late",
        "gptpipe/train/schedule.py",
        "return params.lr * (step + 1) / params.warmup_steps",
        "return params.lr * step / params.warmup_steps",
        ("tests/train/test_schedule.py",),
    ),
    Bug(
        "gradients are summed over micro-batches",
        "gptpipe/train/step.py",
        "loss = plan.loss(x, y) / n_micro_batches",
        "loss = plan.loss(x, y)",
        ("tests/train/test_loop.py::test_micro_batches_change_nothing_but_rounding",),
    ),
    Bug(
        "the seed of dropout ignores the step",
        "gptpipe/train/step.py",
        "torch.manual_seed(_dropout_seed(plan.seed, state.step, ",
        "torch.manual_seed(_dropout_seed(plan.seed, 0, ",
        ("tests/train/test_loop.py::test_each_micro_batch_of_each_step_has_its_own_dropout_seed",),
    ),
    Bug(
        "a gradient that is not finite is applied",
        "gptpipe/train/step.py",
        "    if not (math.isfinite(loss) and math.isfinite(norm)):\n",
        "    if not math.isfinite(loss):\n",
        ("tests/train/test_loop.py::test_a_loss_or_gradient_that_is_not_finite_stops_before_the_update",),
    ),
    Bug(
        "gradients are clipped after the update",
        "gptpipe/train/step.py",
        "    if params.grad_clip is not None and norm > params.grad_clip:\n",
        "    if params.grad_clip is not None and norm < params.grad_clip:\n",
        ("tests/train/test_loop.py",),
    ),
    Bug(
        "a finished training is repeated",
        SESSION,
        "            mark_finished(folder, run_id, inputs.runtime.describe())\n",
        "            pass\n",
        ("tests/train/test_session.py::test_a_finished_training_is_not_repeated",),
    ),
    Bug(
        "the model that is kept is the last, not the best",
        "gptpipe/train/results.py",
        'weights = checkpoints.load_best(summary["best_step"])',
        'weights = checkpoints.load_best(max(int(p.name[5:]) for p in checkpoints.folder.glob("best-*")))',
        ("tests/train/test_session.py::test_the_model_written_is_the_best_not_the_last",),
    ),
    # The record
    Bug(
        "a resumed run logs its steps twice",
        "gptpipe/record/store.py",
        "new = [row for row in rows if row[3] not in self._stored_steps.get(row[0], ())]",
        "new = list(rows)",
        ("tests/record/test_run.py::test_a_resumed_run_gets_each_step_once",),
    ),
    Bug(
        "the champion moves to a worse model",
        "gptpipe/evaluate/registry.py",
        "    if bits_per_byte >= best:\n",
        "    if bits_per_byte <= best:\n",
        ("tests/evaluate/test_registry.py::test_the_champion_moves_only_to_a_better_model_on_the_same_test_documents",),
    ),
    # The process
    Bug(
        "a stage outlives dvc",
        "gptpipe/shell/process.py",
        "    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)\n",
        "",
        ("tests/shell/test_process.py::test_a_stage_ends_when_its_parent_is_killed",),
    ),
    Bug(
        "a stage does not check that dvc has already ended",
        "gptpipe/shell/process.py",
        "    elif _is_orphan(os.getpid()):\n        sys.exit(128 + signal.SIGTERM)\n",
        "",
        ("tests/shell/test_process.py::test_a_stage_exits_if_its_parent_ended_before_it_started",),
    ),
    Bug(
        "two processes may run one stage",
        "gptpipe/shell/process.py",
        "    with one_writer(Path(name)):\n        main()\n",
        "    main()\n",
        ("tests/shell/test_process.py::test_a_second_process_of_a_stage_is_refused_and_names_the_first",),
    ),
)
