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
    threads: 8
    resources:
        gpu=1,
    params:
        lineage=lineage("train"),
        digest=digest("train"),
        data_root=data_root,
        checkpoints=checkpoints,
    shell:
        "tessera train {wildcards.experiment} --checkpoints {params.checkpoints:q} --data-root {params.data_root:q}"
        " --expect {params.digest} --log {log}"
