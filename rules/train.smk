rule train:
    input:
        checked_data,
    output:
        model="results/{experiment}/model.pth",
        metrics="results/{experiment}/metrics.csv",
        report="results/{experiment}/train.json",
    log:
        "logs/train/{experiment}.log",
    conda:
        "../envs/tessera.yaml"
    threads: training("threads")
    resources:
        gpu=training("gpu"),
        nodes=training("nodes"),
        mpi=training("mpi"),
        tasks=training("tasks"),
        tasks_per_node=training("tasks_per_node"),
        tasks_per_gpu=0,
    params:
        lineage=lineage("train"),
        options=options("train"),
        checkpoints=checkpoints,
        launcher=launcher,
    # `exec`: a shell that waited would die of SLURM's SIGTERM, and its job fail while the training still saves.
    shell:
        "exec {params.launcher}tessera train {wildcards.experiment} --checkpoints {params.checkpoints:q} {params.options} --log {log}"
