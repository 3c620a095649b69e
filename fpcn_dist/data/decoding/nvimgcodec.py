"""The decoder of DALI's pipeline on the CPU, one image at a time. Imports neither torch nor DALI itself."""
# nvImageCodec makes its types at import, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false

from __future__ import annotations

import os

# What nvImageCodec would print for a bad file, we report with its path.
os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")

from nvidia import nvimgcodec

from fpcn_dist.data.decoding.formats.header import DAMAGED, UnreadableError
from fpcn_dist.data.decoding.photograph import decode, examine


class Decoder:
    """One instance per thread."""

    def __init__(self) -> None:
        cpu = nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY
        backends = [nvimgcodec.Backend(nvimgcodec.CPU_ONLY)]
        self._decoder = nvimgcodec.Decoder(
            device_id=cpu, max_num_cpu_threads=1, backends=backends, options=":fancy_upsampling=1"
        )
        self._as_stored = nvimgcodec.DecodeParams(apply_exif_orientation=False)

    def fault(self, data: bytes, max_pixels: int) -> str | None:
        """Why an image file is not shown, or ``None`` where it is."""
        try:
            header = examine(data, max_pixels)
            if not header.plain:
                decode(header)
                return None
            stream = nvimgcodec.CodeStream(header.encoded)
            return None if self._decoder.decode([stream], params=self._as_stored)[0] is not None else DAMAGED
        except RuntimeError:
            return DAMAGED
        except UnreadableError as error:
            return str(error)
