# Data and models that runs share: made once for all that agree in what they depend on.


rule raw:
    output:
        "{shared}/raw/{name}.parquet",
    log:
        "{shared}/logs/raw/{name}.log",
    benchmark:
        "{shared}/benchmarks/raw/{name}.tsv"
    params:
        pairs=lambda w: SHARED.at(w, "raw").pairs,
    shell:
        "earl shapes raw --out {output:q} {params.pairs} 2>&1 | tee {log:q}"


rule shapes_policy:
    output:
        "{shared}/policy/{name}/manifest.json",
    log:
        "{shared}/logs/policy/{name}.log",
    benchmark:
        "{shared}/benchmarks/policy/{name}.tsv"
    params:
        out=subpath(output[0], parent=True),
        seed=paths.SHAPES_POLICY_SEED,
    shell:
        "earl shapes policy --out {params.out:q} --seed {params.seed} 2>&1 | tee {log:q}"


# Checkpoints, raw pairs and tokenised data on the hub. It runs where the workflow does: nodes may not reach the hub.
rule from_hub:
    input:
        lambda w: SHARED.at(w, w.kind).inputs,
    output:
        "{shared}/{kind}/{name}/manifest.json",
    log:
        "{shared}/logs/{kind}/{name}.log",
    benchmark:
        "{shared}/benchmarks/{kind}/{name}.tsv"
    wildcard_constraints:
        kind="convert|download|fetched",
    params:
        command=lambda w: SHARED.at(w, w.kind).from_hub,
        out=subpath(output[0], parent=True),
    shell:
        "earl {params.command} --out {params.out:q} 2>&1 | tee {log:q}"


rule tokenise:
    input:
        lambda w: SHARED.at(w, "tokenised").inputs,
    output:
        "{shared}/tokenised/{name}/manifest.json",
    log:
        "{shared}/logs/tokenise/{name}.log",
    benchmark:
        "{shared}/benchmarks/tokenise/{name}.tsv"
    threads: lambda w: SHARED.at(w, "tokenised").config.cpu_threads
    resources:
        gpu=lambda w: need.tokenising_gpus(SHARED.at(w, "tokenised").config),
    params:
        config=lambda w: SHARED.at(w, "tokenised").config_file,
        dataset=lambda w: SHARED.at(w, "tokenised").name,
        raw=lambda w: SHARED.at(w, "tokenised").raw,
        out=subpath(output[0], parent=True),
    shell:
        "earl tokenise --config {params.config:q} --dataset {params.dataset} --raw {params.raw:q}"
        " --out {params.out:q} 2>&1 | tee {log:q}"
