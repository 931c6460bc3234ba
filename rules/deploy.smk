rule export:
    input:
        "results/{experiment}/model.pth",
    output:
        graph="results/{experiment}/model.onnx",
        report="results/{experiment}/export.json",
    log:
        "logs/export/{experiment}.log",
    conda:
        "../envs/tessera.yaml"
    threads: 2
    params:
        lineage=lineage("export"),
        options=options("export"),
    shell:
        "tessera export {wildcards.experiment} {params.options} --log {log}"


rule precision:
    input:
        "results/{experiment}/model.onnx",
    output:
        graph="results/{experiment}/model{suffix}.onnx",
        report="results/{experiment}/precision{suffix}.json",
    log:
        "logs/precision/{experiment}{suffix}.log",
    wildcard_constraints:
        suffix=r"\.fp16",
    conda:
        "../envs/tessera.yaml"
    threads: 2
    params:
        lineage=lineage("precision"),
        precision=precision_of,
        options=options("precision"),
    shell:
        "tessera precision {wildcards.experiment} --precision {params.precision} {params.options} --log {log}"


rule engine:
    input:
        "results/{experiment}/model{suffix}.onnx",
    output:
        engine="results/{experiment}/model{suffix}.engine",
        header="results/{experiment}/model{suffix}.engine.json",
    log:
        "logs/engine/{experiment}{suffix}.log",
    conda:
        "../envs/tessera.yaml"
    threads: 2
    resources:
        gpu=1,
    params:
        lineage=lineage("engine"),
        precision=precision_of,
        options=options("engine"),
    shell:
        "tessera engine {wildcards.experiment} --precision {params.precision} {params.options} --log {log}"


rule parity_onnx:
    input:
        reference="results/{experiment}/model.pth",
        candidate="results/{experiment}/model{suffix}.onnx",
    output:
        "results/{experiment}/onnx_parity{suffix}.json",
    log:
        "logs/parity_onnx/{experiment}{suffix}.log",
    conda:
        "../envs/tessera.yaml"
    threads: 4
    params:
        lineage=lineage("parity", "onnx"),
        precision=precision_of,
        options=options("parity", "onnx"),
    shell:
        "tessera parity {wildcards.experiment} --runtime onnx --precision {params.precision} {params.options} --log {log}"


rule parity_trt:
    input:
        reference="results/{experiment}/model.pth",
        candidate="results/{experiment}/model{suffix}.engine",
    output:
        "results/{experiment}/trt_parity{suffix}.json",
    log:
        "logs/parity_trt/{experiment}{suffix}.log",
    conda:
        "../envs/tessera.yaml"
    threads: 4
    resources:
        gpu=1,
    params:
        lineage=lineage("parity", "trt"),
        precision=precision_of,
        options=options("parity", "trt"),
    shell:
        "tessera parity {wildcards.experiment} --runtime trt --precision {params.precision} {params.options} --log {log}"
