rule evaluate:
    input:
        "results/{experiment}/model.pth",
    output:
        metrics="results/{experiment}/eval{testing}.json",
        predictions="results/{experiment}/eval{testing}.predictions.json.gz",
        statistics="results/{experiment}/eval{testing}.statistics.json.gz",
    log:
        "logs/evaluate/{experiment}{testing}.log",
    conda:
        "../envs/tessera.yaml"
    threads: 4
    resources:
        gpu=1,
    params:
        lineage=lineage("evaluate"),
        options=options("evaluate"),
    shell:
        "tessera evaluate {wildcards.experiment} --runtime torch {params.options} --log {log}"


rule evaluate_onnx:
    input:
        model="results/{experiment}/model{suffix}.onnx",
        parity="results/{experiment}/onnx_parity{suffix}.json",
    output:
        metrics="results/{experiment}/onnx_eval{suffix}{testing}.json",
        predictions="results/{experiment}/onnx_eval{suffix}{testing}.predictions.json.gz",
        statistics="results/{experiment}/onnx_eval{suffix}{testing}.statistics.json.gz",
    log:
        "logs/evaluate_onnx/{experiment}{suffix}{testing}.log",
    conda:
        "../envs/tessera.yaml"
    threads: 4
    params:
        lineage=lineage("evaluate", "onnx"),
        precision=precision_of,
        options=options("evaluate", "onnx"),
    shell:
        "tessera evaluate {wildcards.experiment} --runtime onnx --precision {params.precision} {params.options} --log {log}"


rule evaluate_trt:
    input:
        model="results/{experiment}/model{suffix}.engine",
        parity="results/{experiment}/trt_parity{suffix}.json",
    output:
        metrics="results/{experiment}/trt_eval{suffix}{testing}.json",
        predictions="results/{experiment}/trt_eval{suffix}{testing}.predictions.json.gz",
        statistics="results/{experiment}/trt_eval{suffix}{testing}.statistics.json.gz",
    log:
        "logs/evaluate_trt/{experiment}{suffix}{testing}.log",
    conda:
        "../envs/tessera.yaml"
    threads: 4
    resources:
        gpu=1,
    params:
        lineage=lineage("evaluate", "trt"),
        precision=precision_of,
        options=options("evaluate", "trt"),
    shell:
        "tessera evaluate {wildcards.experiment} --runtime trt --precision {params.precision} {params.options} --log {log}"


rule infer:
    input:
        "results/{experiment}/model.pth",
    output:
        "results/{experiment}/inference{testing}/index.json",
    log:
        "logs/infer/{experiment}{testing}.log",
    conda:
        "../envs/tessera.yaml"
    threads: 4
    resources:
        gpu=1,
    params:
        lineage=lineage("infer"),
        options=options("infer"),
    shell:
        "tessera infer {wildcards.experiment} --runtime torch {params.options} --log {log}"


rule infer_onnx:
    input:
        model="results/{experiment}/model{suffix}.onnx",
        parity="results/{experiment}/onnx_parity{suffix}.json",
    output:
        "results/{experiment}/onnx_inference{suffix}{testing}/index.json",
    log:
        "logs/infer_onnx/{experiment}{suffix}{testing}.log",
    conda:
        "../envs/tessera.yaml"
    threads: 4
    params:
        lineage=lineage("infer", "onnx"),
        precision=precision_of,
        options=options("infer", "onnx"),
    shell:
        "tessera infer {wildcards.experiment} --runtime onnx --precision {params.precision} {params.options} --log {log}"


rule infer_trt:
    input:
        model="results/{experiment}/model{suffix}.engine",
        parity="results/{experiment}/trt_parity{suffix}.json",
    output:
        "results/{experiment}/trt_inference{suffix}{testing}/index.json",
    log:
        "logs/infer_trt/{experiment}{suffix}{testing}.log",
    conda:
        "../envs/tessera.yaml"
    threads: 4
    resources:
        gpu=1,
    params:
        lineage=lineage("infer", "trt"),
        precision=precision_of,
        options=options("infer", "trt"),
    shell:
        "tessera infer {wildcards.experiment} --runtime trt --precision {params.precision} {params.options} --log {log}"
