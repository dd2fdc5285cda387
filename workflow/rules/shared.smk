# Data and models that runs share: made once for all that agree in what they depend on.


rule raw:
    output:
        "{shared}/raw/{name}.parquet",
    log:
        "{shared}/logs/raw/{name}.log",
    benchmark:
        "{shared}/benchmarks/raw/{name}.tsv"
    params:
        command=lambda w: SHARED.command(w, "raw"),
    shell:
        "earl {params.command} --out {output:q} 2>&1 | tee {log:q}"


# From the hub: checkpoints, raw pairs, tokenised data; and the untrained policy of the shapes world.
rule fetch:
    input:
        lambda w: SHARED.inputs(w, w.kind),
    output:
        "{shared}/{kind}/{name}/manifest.json",
    log:
        "{shared}/logs/{kind}/{name}.log",
    benchmark:
        "{shared}/benchmarks/{kind}/{name}.tsv"
    wildcard_constraints:
        kind="convert|download|fetched|policy",
    params:
        command=lambda w: SHARED.command(w, w.kind),
        out=subpath(output[0], parent=True),
    shell:
        "earl {params.command} --out {params.out:q} 2>&1 | tee {log:q}"


rule tokenise:
    input:
        lambda w: SHARED.inputs(w, "tokenised"),
    output:
        "{shared}/tokenised/{name}/manifest.json",
    log:
        "{shared}/logs/tokenised/{name}.log",
    benchmark:
        "{shared}/benchmarks/tokenised/{name}.tsv"
    threads: lambda w: need.threads(SHARED.config(w, "tokenised"), "tokenise")
    resources:
        gpu=lambda w: need.gpus(SHARED.config(w, "tokenised"), "tokenise"),
        cpus_per_task=lambda w: need.threads(SHARED.config(w, "tokenised"), "tokenise"),
    params:
        command=lambda w: SHARED.command(w, "tokenised"),
        out=subpath(output[0], parent=True),
    shell:
        "earl {params.command} --out {params.out:q} 2>&1 | tee {log:q}"


# Completions of a run to learn from. Where the run is in the plan, its iterations come first.
rule select:
    input:
        lambda w: SHARED.inputs(w, "selected"),
    output:
        "{shared}/selected/{name}/manifest.json",
    log:
        "{shared}/logs/selected/{name}.log",
    benchmark:
        "{shared}/benchmarks/select/{name}.tsv"
    params:
        command=lambda w: SHARED.command(w, "selected"),
        out=subpath(output[0], parent=True),
    shell:
        "earl {params.command} --out {params.out:q} 2>&1 | tee {log:q}"


# Supervised fine-tuning: the policy that RL, or another fine-tuning, starts from.
rule sft:
    input:
        lambda w: SHARED.inputs(w, "sft"),
    output:
        "{shared}/sft/{name}/manifest.json",
    log:
        "{shared}/logs/sft/{name}.log",
    benchmark:
        "{shared}/benchmarks/sft/{name}.tsv"
    threads: lambda w: need.threads(SHARED.config(w, "sft"), "sft")
    resources:
        gpu=lambda w: need.gpus(SHARED.config(w, "sft"), "sft"),
        cpus_per_task=lambda w: need.threads(SHARED.config(w, "sft"), "sft"),
    params:
        command=lambda w: SHARED.command(w, "sft"),
        out=subpath(output[0], parent=True),
    shell:
        "earl {params.command} --out {params.out:q} 2>&1 | tee {log:q}"
