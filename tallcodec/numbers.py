"""The numbers of docs/format.md by the names that Python uses for them."""

DTYPES = {
    "F32": 1, "F16": 2, "BF16": 3,
    "I8": 16, "U8": 17, "I16": 18, "U16": 19, "I32": 20, "U32": 21, "I64": 22, "U64": 23,
    "BOOL": 24,
    "F64": 32, "F8_E4M3": 33, "F8_E5M2": 34, "F8_E4M3FNUZ": 35, "F8_E5M2FNUZ": 36, "F8_E8M0": 37,
    "C64": 38,
}  # fmt: skip
ARITHMETIC = ("F32", "F16", "BF16")
SHARED_DTYPES = {"auto": None, "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}
SCALES = {"none": 0, "unit-gain": 1, "unit-gain-row": 2}
BASE_STORAGES = {"embed": 1, "reference": 2}
MERGES = {"task-arithmetic": 1, "average": 2, "ties": 3}
METHODS = {"tall": 1, "magnitude": 2, "adapted": 3, "ternary": 4}

PLANES = {
    "base": 1, "shared": 2, "mask": 3, "ternary": 4, "scales": 5, "verbatim": 6, "file": 7,
}  # fmt: skip
RAW, ZSTD, EXTERNAL, GAPS, CONDITIONAL = range(5)  # a plane's coding
BASE, MASK, VERBATIM, ABSENT, TERNARY = range(5)  # an entry's coding
REASONS = {
    "": 0,
    "not an arithmetic type": 1,
    "another shape than in the base": 2,
    "not in the base": 3,
    "NaN or infinity in the task": 4,
    "NaN or infinity in the base": 5,
}


def name_of(number: int, names: dict[str, int]) -> str:
    """The name of a number, or the number itself where a newer writer gave it."""
    return next((name for name, value in names.items() if value == number), f"unknown ({number})")
