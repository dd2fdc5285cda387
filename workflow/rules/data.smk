# Data and models that runs share: made once for all that agree in what they depend on.


rule raw:
    output:
        "{shared}/raw/{name}.parquet",
    log:
        "{shared}/logs/raw/{name}.log",
    benchmark:
        "{shared}/benchmarks/raw/{name}.tsv"
    params:
        earl=launched("raw"),
        options=shapes_options,
    shell:
        "{params.earl} shapes raw --out {output} {params.options} 2>&1 | tee {log}"


rule shapes_policy:
    output:
        "{shared}/policy/{name}/manifest.json",
    log:
        "{shared}/logs/policy/{name}.log",
    benchmark:
        "{shared}/benchmarks/policy/{name}.tsv"
    params:
        earl=launched("shapes_policy"),
        out=subpath(output[0], parent=True),
        seed=paths.SHAPES_POLICY_SEED,
    shell:
        "{params.earl} shapes policy --out {params.out} --seed {params.seed} 2>&1 | tee {log}"


# A name on the hub that stands where a folder could. It runs where the workflow does: nodes may not reach the hub.
rule convert:
    input:
        lambda w: made_from(w, "convert"),
    output:
        "{shared}/convert/{name}/manifest.json",
    log:
        "{shared}/logs/convert/{name}.log",
    benchmark:
        "{shared}/benchmarks/convert/{name}.tsv"
    params:
        earl=EARL,
        published=published,
        out=subpath(output[0], parent=True),
    shell:
        "{params.earl} convert model {params.published} --out {params.out} 2>&1 | tee {log}"


# Raw pairs on the hub; runs where the workflow does, as `convert`.
rule download:
    output:
        "{shared}/download/{name}/manifest.json",
    log:
        "{shared}/logs/download/{name}.log",
    benchmark:
        "{shared}/benchmarks/download/{name}.tsv"
    params:
        earl=EARL,
        files=lambda w: shared_stage(w, "download").name,
        out=subpath(output[0], parent=True),
    shell:
        "{params.earl} download {params.files:q} --out {params.out} 2>&1 | tee {log}"


# Published tokenised data on the hub; runs where the workflow does, as `convert`.
rule fetch:
    output:
        "{shared}/fetched/{name}/manifest.json",
    log:
        "{shared}/logs/fetch/{name}.log",
    benchmark:
        "{shared}/benchmarks/fetch/{name}.tsv"
    params:
        earl=EARL,
        data=lambda w: shared_stage(w, "fetched").name,
        out=subpath(output[0], parent=True),
    shell:
        "{params.earl} data fetch {params.data} --out {params.out} 2>&1 | tee {log}"


rule tokenise:
    input:
        lambda w: made_from(w, "tokenised"),
    output:
        "{shared}/tokenised/{name}/manifest.json",
    log:
        "{shared}/logs/tokenise/{name}.log",
    benchmark:
        "{shared}/benchmarks/tokenise/{name}.tsv"
    threads: lambda w: user_of(w, "tokenised").config.cpu_threads
    params:
        earl=launched("tokenise"),
        config=lambda w: user_of(w, "tokenised").run.config,
        dataset=lambda w: shared_stage(w, "tokenised").name,
        raw=raw_pairs,
        out=subpath(output[0], parent=True),
    shell:
        "{params.earl} tokenise --config {params.config} --dataset {params.dataset} --raw {params.raw:q}"
        " --out {params.out} 2>&1 | tee {log}"
