"""The open slides of a process: as many as it may hold, the longest unused closed first."""

import threading
from collections import OrderedDict

from dinov2.data.slides.reader import Slide, open_slide


class SlidePool:
    """Opens slides and keeps the last ones open; another process starts with none.

    Args:
        limit: slides held open at a time.
        backend: see :func:`~dinov2.data.slides.reader.open_slide`.
    """

    def __init__(self, limit: int, backend: str) -> None:
        self._limit, self._backend = limit, backend
        self._slides: OrderedDict[str, Slide] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        return {"limit": self._limit, "backend": self._backend}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def get(self, path: str, mpp: float) -> Slide:
        """Return the slide of a file, open or about to open itself.

        Raises:
            DatasetError: it can not be opened.
        """
        with self._lock:
            slide = self._slides.get(path)
            if slide is None:
                slide = self._slides[path] = open_slide(path, mpp=mpp, backend=self._backend)
                if len(self._slides) > self._limit:
                    self._slides.popitem(last=False)[1].close()
            self._slides.move_to_end(path)
            return slide
