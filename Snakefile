# The whole workflow. `snakemake --cores 8` builds the configured grid and its tables; any file below results/ can be asked for by name.
from snakemake.utils import min_version

min_version("9.27")


configfile: "config/config.yaml"


report: "report/workflow.rst"


include: "rules/common.smk"
include: "rules/data.smk"
include: "rules/train.smk"
include: "rules/deploy.smk"
include: "rules/evaluate.smk"
include: "rules/compare.smk"


rule all:
    default_target: True
    input:
        PLAN.default_targets(),


onstart:
    begin()


onsuccess:
    PLAN.forget()


onerror:
    PLAN.forget()
