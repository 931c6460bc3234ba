# Translates wildcards into questions to the plan; what needs thought lives in src/tessera/spec/planning.py, where pytest sees it.
import gc
import inspect

from tessera.spec.planning import (
    FIGURES,
    Answers,
    engine_notice,
    planned_options,
    records_notice,
)

PLAN = Answers(config)
PLANNED_OPTIONS = planned_options()

# Planning makes millions of objects that stay: at Python's own thresholds a seventh of its time goes into looking for garbage among them.
gc.set_threshold(50_000, 20, 100)

for notice in (records_notice(), PLAN.absence_notice()):
    if notice:
        logger.warning(notice)
PLAN.refuse_unsafe_repro()


def signed(function):
    """Snakemake asks for the signature with every job, a tenth of its time: this one is at hand."""
    function.__signature__ = inspect.signature(function)
    return function


# Names are looked up, never parsed: an unknown one is answered by the plan with the closest names.
wildcard_constraints:
    experiment="[^/]+",
    table="[^/]+",
    dataset="[^/]+",
    suffix=r"(\.fp16)?",
    testing=PLAN.testing_pattern(),


@signed
def precision_of(wildcards):
    return PLAN.precision(wildcards.get("suffix", ""))


def run_of(wildcards):
    return precision_of(wildcards), wildcards.get("testing", "").removeprefix(".")


def lineage(verb, runtime="torch"):
    @signed
    def lineage_of(wildcards):
        return PLAN.lineage(wildcards.experiment, verb, runtime, *run_of(wildcards))

    return lineage_of


@signed
def checked_data(wildcards):
    return f"data/checks/{PLAN.dataset_of(wildcards.experiment)}.json"


def dataset_files(wildcards):
    return PLAN.dataset_files(wildcards.dataset)


def generator(wildcards):
    return PLAN.generator(wildcards.dataset)


def archives(wildcards):
    return PLAN.archives(wildcards.dataset)


def given_files(wildcards):
    return PLAN.given_files(wildcards.dataset)


def conversion(wildcards):
    return PLAN.conversion(wildcards.dataset)


def dataset_lineage(wildcards):
    return PLAN.checked(wildcards.dataset)


def table_evaluations(wildcards):
    return PLAN.table_evaluations(wildcards.table)


def table_sources(wildcards):
    return PLAN.table_sources(wildcards.table)


def table_lineage(wildcards):
    return PLAN.table_lineage(wildcards.table)


def figure_sources(wildcards):
    return PLAN.figure_sources(wildcards.table)


def figures_lineage(wildcards):
    return PLAN.figures_lineage(wildcards.table)


def metrics_evaluations(wildcards):
    return PLAN.metrics_evaluations()


def metrics_lineage(wildcards):
    return PLAN.metrics_lineage()


# Snakemake tracks no param whose function also asks for the output: where data and resume state lie changes no result.
def options(verb, runtime="torch"):
    @signed
    def options_of(wildcards, output):
        return PLANNED_OPTIONS.get(str(output[0])) or PLAN.options(
            wildcards.experiment, verb, runtime, *run_of(wildcards)
        )

    return options_of


def dataset_root(wildcards, output):
    return PLAN.root_of(wildcards.dataset)


def given_root(wildcards, output):
    return PLAN.data_root


@signed
def checkpoints(wildcards, output):
    return PLAN.checkpoints


def training(resource):
    @signed
    def resource_of(wildcards):
        return PLAN.training_resources(wildcards.experiment).get(resource)

    return resource_of


@signed
def launcher(wildcards, output, threads):
    return PLAN.launcher(wildcards.experiment, threads)


def begin():
    from tessera.inference.trt_library import availability

    jobs = list(workflow.dag.needrun_jobs())
    notice = engine_notice((job.rule.name for job in jobs), availability)
    if notice:
        logger.warning(notice)
    stages = [job for job in jobs if "options" in job.params.keys()]
    PLAN.refuse_lost_data(
        ((job.rule.name, job.wildcards.experiment) for job in stages),
        {str(file) for job in jobs for file in job.output},
    )
    PLAN.remember({str(job.output[0]): job.params.options for job in stages})
