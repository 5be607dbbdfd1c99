"""A thread that waits for what a device computes, so that the executor's loop need not."""

import os
import queue
import threading

from ..models.stepper import Step


class DeviceWaiter:
    """A thread that waits for launched steps in turn and makes `fileno()` readable when one is ready.

    What the device's work raises stops the thread; `check` raises it again.
    """

    def __init__(self) -> None:
        self._steps: queue.SimpleQueue[Step] = queue.SimpleQueue()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._error: Exception | None = None
        threading.Thread(target=self._run, name="device-waiter", daemon=True).start()

    def fileno(self) -> int:
        """The descriptor."""
        return self._bell

    def add(self, step: Step) -> None:
        """Wait for `step` after those before it."""
        self._steps.put(step)

    def check(self) -> None:
        """Take the wake-up; raise the device's error if there was one."""
        os.eventfd_read(self._bell)
        if self._error is not None:
            raise RuntimeError("the device failed") from self._error

    def _run(self) -> None:
        while True:
            step = self._steps.get()
            try:
                step.wait()
            except Exception as error:
                self._error = error
            os.eventfd_write(self._bell, 1)
