"""What kernels become on a GPU that is not there: `python ptx_probes.py` prints the instructions of some, as JSON.

Of each variant how often each instruction stands in its PTX, with its modifiers: {"ld.global.v2.b64": 4, ...}.
"""

import json
import re
from collections import Counter

from pagedkv.kernels.triton import quantize, rope, rope_store_kv, store_kv
from pagedkv.testing.triton_compile_worker import _compile

TARGET = "cuda:90"
PROBED = {
    store_kv: ["T16384-H8-128-128-bfloat16-moved-NHD-launch1", "T16384-H8-128-128-bfloat16-moved-HND-launch1"],
    quantize: ["bfloat16-to-float8_e4m3fn-128", "bfloat16-to-float8_e4m3fn-128-native", "float16-to-int8-128"],
    rope: ["apply_rope-bf16-128-of-128-T5000", "apply_rope-fp32-64-of-128-T64"],
    rope_store_kv: [
        "rope_store_kv-bf16-to-bf16-128-of-128-T5000-claims",
        "rope_store_kv-fp32-to-fp32-64-of-80-T64-looks-ahead",
        "rope_store_kv-bf16-to-native-e4m3-128-of-128-T5000-claims",
    ],
}


def instructions(variant):
    # In a line, perhaps after a predicate.
    return Counter(re.findall(r"(?m)^\s*(?:@!?%p\d+ +)?([a-z][\w.:]*)[ ;]", _compile(variant, TARGET).asm["ptx"]))


def main():
    found = {}
    for module, names in PROBED.items():
        variants = {variant.name: variant for variant in module.compile_variants()}
        for name in names:
            found[f"{module.__name__.rpartition('.')[2]}: {name}"] = instructions(variants[name])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
