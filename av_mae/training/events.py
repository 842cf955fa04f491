"""TensorBoard events, written at once: a full disk is an OSError here and not a dead writer thread elsewhere."""

import io
import os
import pathlib
import time
from collections.abc import Mapping

import numpy as np
from PIL import Image
from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import RecordWriter


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

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Adds a picture, uint8 [height, width, 3]."""
        png = io.BytesIO()
        Image.fromarray(picture).save(png, "png")
        height, width, channels = picture.shape
        image = summary_pb2.Summary.Image(height=height, width=width, colorspace=channels,
                                          encoded_image_string=png.getvalue())
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
