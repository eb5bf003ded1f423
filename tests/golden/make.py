"""Write the golden vectors: inputs are formulas (cases.formula), outputs are stored as hex.

Run only when a format is added. A change in an existing file is a change of the format.
"""

import json
import sys
import zlib
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from bnbq import reference as ref  # noqa: E402
from cases import formula  # noqa: E402

COUNT, SEED = 1351, 7  # odd, and not a multiple of any block size


def vectors() -> dict:
    """File name -> content."""
    files = {}
    flat = formula(COUNT, SEED)
    for name in ref.FORMATS:
        rows = []
        for blocksize in ref.BLOCKSIZES:
            q, absmax = ref.quantize_4bit(flat, name, blocksize)
            codes, absmax2, offset = ref.quantize_absmax(absmax)
            w = ref.dequantize_4bit(q, absmax, flat.shape, name, blocksize)
            rows.append({"blocksize": blocksize, "qweight": q.tobytes().hex(), "absmax": absmax.astype("<f4").tobytes().hex(),
                         "absmax_codes": codes.tobytes().hex(), "absmax2": absmax2.astype("<f4").tobytes().hex(),
                         "offset": offset.astype("<f4").tobytes().hex(), "dense_crc32": zlib.crc32(w.astype("<f4").tobytes())})
        files[f"{name}.json"] = {"input": {"count": COUNT, "seed": SEED}, "vectors": rows}
    w = formula(7 * 193, SEED).reshape(7, 193)
    rows = []
    for blocksize in (0, *ref.BLOCKSIZES[:3]):
        q, absmax = ref.quantize_8bit(w, blocksize)
        rows.append({"blocksize": blocksize, "qweight": q.tobytes().hex(), "absmax": absmax.astype("<f4").tobytes().hex()})
    files["int8.json"] = {"input": {"shape": [7, 193], "seed": SEED}, "vectors": rows}
    return files


if __name__ == "__main__":
    for name, content in vectors().items():
        (HERE / name).write_text(json.dumps(content, indent=1) + "\n")
        print(HERE / name)
