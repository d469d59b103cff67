"""Compiles the training step of a config for devices that this machine need not have, and reports what each needs.

python tools/plan.py --config=configs/hybrid_8k.py:8b --target=v5p:4x4x4 --config.mesh.fsdp=64 --batch=64
python tools/plan.py --config=configs/hybrid_8k.py --target=cpu:8 --config.mesh.context=8 --config.mesh.data=1
python tools/plan.py --config=configs/hybrid_8k.py:150m --target=h100:1 --batch=1 --config.model.num_layers=4 --kernels

It prints whether the step fits, its memory, FLOPs, largest array, and collectives by mesh axis. It runs no step and reads no
data: a note says where training would need a tokenizer. Exit codes: 0 it fits; 1 it does not; 2 a wrong config, or a target
that cannot be compiled for.
"""

import functools

from absl import flags

from hybrid_attn import config, config_file, programs, trees
from hybrid_attn.data.tokenizer import check_vocab, load_tokenizer
from hybrid_attn.plan import kernels, step, targets

CONFIG = config_file.define("config", None, "Config file, with its argument after a colon.", config.Config)
config_file.define_last_stage()
TARGET = flags.DEFINE_string("target", None, targets.FORMS)
KERNELS = flags.DEFINE_boolean("kernels", False, "Also print the kernels that a GPU runs for one layer of each type.")
STAGE = flags.DEFINE_integer("stage", -1, "Stage of the config, from 0; the last by default.")
flags.mark_flags_as_required(["config", "target"])


def plan_step() -> int:
    c = config.build(CONFIG.value.values)
    stages = f"{len(c.stages)} stage{'' if len(c.stages) == 1 else 's'}"
    trees.check(-1 <= STAGE.value < len(c.stages), f"--stage={STAGE.value}: the config has {stages}, counted from 0")
    kind = TARGET.value.partition(":")[0]
    trees.check(not KERNELS.value or kind == "h100", f"--kernels reads programs for GPUs, not for {TARGET.value}; use h100:8")
    plan = step.make_plan(c, targets.find_target(TARGET.value), STAGE.value)
    print(step.report(plan))
    if KERNELS.value:
        print(f"\n{kernels.report(plan.text)}")
    if c.data.tokenizer == "bytes":  # a tokenizer.json may not be on this machine
        try:
            check_vocab(load_tokenizer("bytes"), c.model.vocab_size, "bytes")
        except ValueError as error:
            print(f"\nnote         no data was read; launch/train.py would say: {error}")
    return int(not step.fits(plan))


def main(argv):
    programs.run(plan_step, argv)


start = functools.partial(programs.start, main, __name__)  # the console script
