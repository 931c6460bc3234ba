rule demo:
    output:
        "data/{dataset}/manifest.json",
    log:
        "logs/demo/{dataset}.log",
    wildcard_constraints:
        dataset=PLAN.datasets_with("generator"),
    conda:
        "../envs/tessera.yaml"
    params:
        lineage=generator,
        data_root=dataset_root,
    shell:
        "tessera demo {wildcards.dataset} --data-root {params.data_root:q} --log {log}"


rule fetch:
    output:
        "data/{dataset}/fetch.json",
    log:
        "logs/fetch/{dataset}.log",
    wildcard_constraints:
        dataset=PLAN.datasets_with("fetch"),
    conda:
        "../envs/tessera.yaml"
    params:
        lineage=archives,
        data_root=given_root,
    shell:
        "tessera fetch {wildcards.dataset} --data-root {params.data_root:q} --log {log}"


rule convert:
    input:
        given_files,
    output:
        "data/{dataset}/converted/manifest.json",
        "data/{dataset}/converted/dropped.csv",
    log:
        "logs/convert/{dataset}.log",
    wildcard_constraints:
        dataset=PLAN.datasets_with("convert"),
    conda:
        "../envs/tessera.yaml"
    threads: 4
    params:
        lineage=conversion,
        data_root=dataset_root,
    shell:
        "tessera convert {wildcards.dataset} --processes {threads} --data-root {params.data_root:q} --log {log}"


rule check:
    input:
        dataset_files,
    output:
        "data/checks/{dataset}.json",
    log:
        "logs/check/{dataset}.log",
    conda:
        "../envs/tessera.yaml"
    params:
        lineage=dataset_lineage,
        data_root=dataset_root,
    shell:
        "tessera check {wildcards.dataset} --out {output} --data-root {params.data_root:q} --log {log}"
