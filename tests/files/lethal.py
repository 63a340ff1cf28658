"""What kills the process that reads a picture, as a decoder does that crashes; imports nothing heavy."""

from __future__ import annotations

import os
import signal


class Lethal:
    """Stands in the place of what is known; whoever asks it is killed."""

    def __contains__(self, key):
        os.kill(os.getpid(), signal.SIGKILL)
