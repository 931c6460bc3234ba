rule compare:
    input:
        table_sources,
    output:
        "results/tables/{table}.csv",
        "results/tables/{table}.md",
        "results/tables/{table}.tex",
        "results/tables/{table}.json",
    log:
        "logs/compare/{table}.log",
    conda:
        "../envs/tessera.yaml"
    params:
        lineage=table_lineage,
        data_root=given_root,
    shell:
        "tessera compare {wildcards.table} --data-root {params.data_root:q} --log {log}"


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
        "tessera metrics --data-root {params.data_root:q} --log {log}"
