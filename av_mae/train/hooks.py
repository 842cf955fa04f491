"""What happens periodically in a run: metrics, checkpoints, reconstructions, failures, profile."""

import functools
import io
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np
from PIL import Image
from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import RecordWriter

from av_mae import models
from av_mae.checkpoint import Checkpoints
from av_mae.config import TrainConfig
from av_mae.console import Progress, first_line
from av_mae.errors import ClipFailure, FailureCount, UserError, batch_failures
from av_mae.storage import replace_file
from av_mae.train.local_checkpoint import LocalCheckpoints
from av_mae.train.loop import Hook, Moment, NonFinite, Prefetch
from av_mae.train.sharding import gather_failures
from av_mae.train.step import Batch, TrainStep
from av_mae.workdir import SkippedFile, named, no_links


class Events:
    """One event file of a run in `folder`. Events of earlier files after step `resumed` no longer count.

    Methods raise OSError where the file cannot be written.
    """

    def __init__(self, folder: pathlib.Path, resumed: int):
        name = f"events.out.tfevents.{int(time.time())}.{os.uname().nodename}.{os.getpid()}"
        self._writer = RecordWriter(str(folder / name))
        self._write(event_pb2.Event(file_version="brain.Event:2"))
        if resumed:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(event_pb2.Event(step=resumed + 1, session_log=start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the values of one step by name."""
        entries = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=entries)))

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Adds an image, uint8 [height, width, 3]."""
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "png")
        height, width, channels = pixels.shape
        image = summary_pb2.Summary.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=png.getvalue()
        )
        value = summary_pb2.Summary.Value(tag=name, image=image)
        self._write(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=[value])))

    def _write(self, event: event_pb2.Event) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())
        self._writer.flush()

    def close(self) -> None:
        """Closes the file; what a full disk kept out of it is lost."""
        try:
            self._writer.close()
        except OSError:
            pass


SHOWN_CLIPS = 4
PROFILE_STEPS = 3
SHOWN = ("loss", "image_loss", "audio_loss", "clips_per_second")


class MetricsFile:
    """`metrics.jsonl`: one JSON object per line. Lines after the step that a run resumes from are dropped.

    Where the disk is full, lines wait in memory for the next attempt.
    """

    def __init__(self, path: pathlib.Path, resumed: int):
        self.path, self._waiting = path, ""
        lines = path.read_text().splitlines() if path.is_file() else []
        kept = [line for line in lines if self._step(line) <= resumed]
        if kept != lines:
            replace_file(path, "".join(line + "\n" for line in kept))

    @staticmethod
    def _step(line: str) -> float:
        """The line's step; infinite for a line that was cut off."""
        try:
            return float(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            return float("inf")

    def write(self, line: Mapping[str, float]) -> None:
        """Appends a line.

        Raises:
          OSError: it could not be written; it is tried again with the next one.
        """
        self._waiting += json.dumps(line) + "\n"
        left = self._waiting.encode()
        # without a buffer: what could not be written would be tried once more at the file's end
        with open(self.path, "ab", buffering=0, opener=no_links) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                os.ftruncate(file.fileno(), size)
                raise
        self._waiting = ""


class MetricsHook(Hook):
    """metrics.jsonl, TensorBoard and the progress bar.

    Args:
      config: the recipe.
      workdir: metrics.jsonl goes here.
      events: TensorBoard's, `None` where the process is not the first one.
      progress: the bar.
      prefetch: tells how long the loop has waited for its input.
      last: the last step, which always has a line.
      resumed: the step that this attempt goes on from; later lines of earlier attempts are dropped.
      skipped: clips that could not be read before that.
      flops: of one clip in one step, 0 where they are not counted.
      goodput: gives the share of time that was productive so far.
    """

    def __init__(
        self,
        config: TrainConfig,
        workdir: pathlib.Path,
        events: Events | None,
        *,
        progress: Progress,
        prefetch: Prefetch,
        last: int,
        resumed: int,
        skipped: int,
        flops: float = 0.0,
        goodput: Callable[[], float] | None = None,
    ):
        self.flops, self.goodput = flops, goodput
        self.config, self.events, self.progress, self.prefetch, self.last = config, events, progress, prefetch, last
        self.skipped = skipped
        self._file = MetricsFile(workdir / "metrics.jsonl", resumed) if jax.process_index() == 0 else None
        self._window: tuple[int, float, float] | None = None
        self._warned = False

    def after_metrics(self, step: int, metrics: Mapping[str, float], host: Mapping[str, np.ndarray]) -> None:
        self.skipped += self.config.batch_size - round(metrics["valid"])
        if step % self.config.log_every and step != self.last:
            if self._window is None:
                self._window = (step, time.perf_counter(), self.prefetch.wait_seconds)
            self.progress.update(1)
            return
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}  # JSON knows no other
        line = {"step": step, **finite, "skipped": self.skipped}
        del line["valid"]
        line.update(self._rates(step))
        if self.goodput is not None:
            line["goodput"] = self.goodput()
        shown = {name: line[name] for name in SHOWN if name in line}
        self.progress.update(1, **shown)
        self.write(line)

    def _rates(self, step: int) -> dict[str, float]:
        """Clips and FLOPs per second and the share of time spent waiting for input since the last line."""
        now, waited, before = time.perf_counter(), self.prefetch.wait_seconds, self._window
        self._window = (step, now, waited)
        if before is None or now <= before[1]:
            return {}
        seconds = now - before[1]
        clips = (step - before[0]) * self.config.batch_size / seconds
        rates = {"clips_per_second": clips, "input_wait": (waited - before[2]) / seconds}
        return rates | {"flops_per_second": clips * self.flops} if self.flops else rates

    def write(self, line: Mapping[str, float]) -> None:
        """Adds metrics of a step, `step` among them, by name. A full disk is warned of once."""
        if self._file is None or self.events is None:
            return
        try:
            self._file.write(line)
            self.events.scalars(int(line["step"]), {name: x for name, x in line.items() if name != "step"})
        except OSError as error:
            if not self._warned:
                self.progress.write(f"warning: metrics cannot be written ({error.strerror}); training goes on")
            self._warned = True


class FailureHook(Hook):
    """Names clips that could not be read, in `skipped.jsonl` too; stops the run where they are too many (UserError).

    Other processes hand their failures to the first one, which writes the file, every `every` steps and at the end.
    """

    def __init__(
        self, count: FailureCount, file: SkippedFile, say: Callable[[str], None], every: int = 1, shown: int = 20
    ):
        self.count, self.file, self.say, self.every, self._left = count, file, say, every, shown
        self._waiting: list[ClipFailure] = []

    def due(self, step: int, finished: bool, stopped: bool) -> bool:
        return jax.process_count() > 1 and (finished or stopped or step % self.every == 0)

    def after_step(self, moment: Moment) -> None:
        failures, self._waiting = gather_failures(self._waiting), []
        if jax.process_index() == 0:
            self.file.add(failures)

    def after_metrics(self, step: int, metrics: Mapping[str, float], host: Mapping[str, np.ndarray]) -> None:
        failures = batch_failures(host)
        if jax.process_index() == 0:
            self.file.add(failures)
        else:
            self._waiting += failures
        for failure in failures[: self._left]:
            self.say(f"warning: step {step} skips {failure}")
        self._left = max(0, self._left - len(failures))
        self.count.add(host)

    def close(self) -> None:
        if self.count.failures:
            self.say(self.count.summary())


class CheckpointHook(Hook):
    """Saves every `checkpoint_every` steps, at the end and when asked to stop; on the local disk more often.

    `begin` is the position in the data (global clips consumed) before step `first` + 1. Raises UserError once
    `max_failed_saves` saves in a row have failed.
    """

    def __init__(
        self,
        config: TrainConfig,
        checkpoints: Checkpoints,
        metrics: MetricsHook,
        first: int,
        begin: int,
        local: LocalCheckpoints | None = None,
    ):
        self.config, self.checkpoints, self.metrics, self.first, self.begin = config, checkpoints, metrics, first, begin
        self.local = local

    def due(self, step: int, finished: bool, stopped: bool) -> bool:
        local = self.local is not None and step % self.config.checkpoint_local_every == 0
        return finished or stopped or step % self.config.checkpoint_every == 0 or local

    def after_step(self, moment: Moment) -> None:
        step, position = moment.step, self.begin + (moment.step - self.first) * self.config.batch_size
        meta = {"position": position, "skipped": self.metrics.skipped}
        if moment.finished or moment.stopped or step % self.config.checkpoint_every == 0:
            self.checkpoints.save(step, moment.state, self.config, **meta)
            limit = self.config.max_failed_saves
            if limit and self.checkpoints.failures >= limit:
                raise UserError(
                    f"max_failed_saves={limit} checkpoints in a row could not be saved: make room in "
                    f"{self.checkpoints.folder}; the same command goes on from the last one"
                )
        elif self.local is not None:
            self.local.save(step, moment.state, self.config, **meta)


class UpdateHook(Hook):
    """Names updates that were left out because they were not finite or too large, and limits them (NonFinite)."""

    def __init__(self, config: TrainConfig, say: Callable[[str], None]):
        self.limit, self.most, self.say, self.count = config.max_grad_norm, config.max_skipped_updates, say, 0

    def after_metrics(self, step: int, metrics: Mapping[str, float], host: Mapping[str, np.ndarray]) -> None:
        norm = metrics["grad_norm"]
        if not metrics.get("skipped_update") and not 0 < self.limit < norm:
            return
        self.count += 1
        seen = f"step {step}: loss={metrics['loss']:.6g}, grad_norm={norm:.6g}"
        if self.count > self.most:
            raise NonFinite(
                f"{seen}, with max_grad_norm={self.limit:g}: more than max_skipped_updates={self.most} "
                "updates; the run stops and keeps its last checkpoint. Try a lower optimizer.base_lr or "
                f"optimizer.clip_norm. Clips of the batch: {', '.join(map(str, host['id']))}"
            )
        self.say(f"warning: {seen}: this update is left out ({self.count} of max_skipped_updates={self.most})")


def predict_first(model: models.AVMAE, batch: Batch, clips: int) -> tuple[jax.Array, jax.Array, models.Output]:
    """The batch's first clips (image, audio) and the predictions for them, masked by the batch's noise."""
    image, audio, *noises = (batch[name][:clips] for name in ("image", "audio", "image_noise", "audio_noise"))
    return image, audio, model(models.normalize_image(image), audio, *noises)


class ReconstructionHook(Hook):
    """Reconstructions every `images_every` steps and at the end: of the first clips of `shown`, which has its masks'
    noise, so that plots can be compared; else of those of the step's own batch."""

    def __init__(
        self,
        config: TrainConfig,
        step: TrainStep,
        workdir: pathlib.Path,
        events: Events | None,
        say: Callable[[str], None],
        shown: Batch | None = None,
    ):
        self.config, self.folder, self.events, self.say = config, workdir / "images", events, say
        self.shown = shown
        clips = min(SHOWN_CLIPS, config.batch_size)
        self.predict = step.forward(functools.partial(predict_first, clips=clips), drawn=shown is None)

    def due(self, step: int, finished: bool, stopped: bool) -> bool:
        every = self.config.images_every
        return every > 0 and (finished or step % every == 0)

    def after_step(self, moment: Moment) -> None:
        outputs = self.predict(moment.state, moment.batch if self.shown is None else self.shown)
        if self.events is None:
            return
        image, audio, out = jax.device_get(outputs)
        from av_mae import plots  # Matplotlib takes half a second of a start

        plot = plots.reconstructions(image, audio, out, self.config.model)
        try:
            self.folder.mkdir(exist_ok=True)
            plots.save_png(self.folder / f"step_{moment.step:08d}.png", plot)
            self.events.image(moment.step, "reconstructions", plot)
        except OSError as error:
            self.say(f"warning: the plot of step {moment.step} cannot be written ({error.strerror}); training goes on")


class ProfileHook(Hook):
    """A device profile of PROFILE_STEPS steps after step `profile_at`, in `profile/` (TensorBoard, Perfetto)."""

    def __init__(self, at: int, workdir: pathlib.Path, say: Callable[[str], None]):
        self.at, self.folder, self.say, self._running = at, workdir / "profile", say, False

    def due(self, step: int, finished: bool, stopped: bool) -> bool:
        return step == self.at or (self._running and (finished or stopped or step == self.at + PROFILE_STEPS))

    def after_step(self, moment: Moment) -> None:
        if self._running:
            jax.block_until_ready(moment.state)
            self.close()
        elif not moment.finished and not moment.stopped:
            jax.profiler.start_trace(str(self.folder))
            self._running = True

    def close(self) -> None:
        if not self._running:
            return
        self._running = False
        try:
            jax.profiler.stop_trace()
        except Exception as error:  # a full disk, most likely, in the profiler's own words
            self.say(f"warning: the profile cannot be written ({first_line(error)}); training goes on")
            return
        self.say(f"profile of steps {self.at + 1} to {self.at + PROFILE_STEPS} in {named(self.folder)}")
