rule compare:
    input:
        table_sources,
    output:
        "results/tables/{table}.csv",
        "results/tables/{table}.md",
        "results/tables/{table}.tex",
        report(
            "results/tables/{table}.html",
            caption="../report/table.rst",
            category="Tables",
            labels={"table": "{table}"},
        ),
        "results/tables/{table}.json",
    log:
        "logs/compare/{table}.log",
    conda:
        "../envs/tessera.yaml"
    params:
        lineage=table_lineage,
        data_root=given_root,
    shell:
        "tessera compare {wildcards.table:q} --data-root {params.data_root:q} --log {log:q}"


rule figures:
    input:
        figure_sources,
    output:
        report(
            "results/figures/{table}/curves.png",
            caption="../report/curves.rst",
            category="Figures",
            labels={"table": "{table}", "shows": "training curves"},
        ),
        report(
            "results/figures/{table}/accuracy_time.png",
            caption="../report/accuracy_time.rst",
            category="Figures",
            labels={"table": "{table}", "shows": "accuracy against time"},
        ),
        report(
            "results/figures/{table}/classes.png",
            caption="../report/classes.rst",
            category="Figures",
            labels={"table": "{table}", "shows": "scores by class"},
        ),
        report(
            "results/figures/{table}/pictures.png",
            caption="../report/pictures.rst",
            category="Pictures",
            labels={"table": "{table}", "shows": "predictions"},
        ),
        expand("results/figures/{{table}}/{name}.pdf", name=FIGURES),
        "results/figures/{table}/figures.json",
    log:
        "logs/figures/{table}.log",
    conda:
        "../envs/tessera.yaml"
    params:
        lineage=figures_lineage,
        data_root=given_root,
    shell:
        "tessera figures {wildcards.table:q} --data-root {params.data_root:q} --log {log:q}"


# What `dvc metrics` and `dvc plots` show.
rule metrics:
    input:
        metrics_evaluations,
    output:
        "results/metrics.json",
        "results/metrics.csv",
    log:
        "logs/metrics.log",
    conda:
        "../envs/tessera.yaml"
    params:
        lineage=metrics_lineage,
        data_root=given_root,
    shell:
        "tessera metrics --data-root {params.data_root:q} --log {log:q}"
