# Held-out prompts: sampled with a given policy, judged, summarised.


rule evaluate_generate:
    input:
        unpack(INPUTS.evaluate),
    output:
        "{run}/evaluations/{evaluation}/{step}.rollouts.parquet",
    log:
        "{run}/logs/evaluate/{evaluation}-{step}-generate.log",
    benchmark:
        "{run}/benchmarks/evaluate_generate/{evaluation}-{step}.tsv"
    threads: lambda w: need.threads(config_of(w), "generate")
    resources:
        gpu=lambda w: need.gpus(config_of(w), "generate"),
        cpus_per_task=lambda w: need.threads(config_of(w), "generate"),
    shell:
        "earl generate --config {wildcards.run:q}/config.json --iteration {wildcards.step}"
        " --evaluation {wildcards.evaluation} --policy {wildcards.run:q}/iterations/{wildcards.step}/policy"
        " --out {output:q} 2>&1 | tee {log:q}"


rule evaluate_score:
    input:
        "{run}/evaluations/{evaluation}/{step}.rollouts.parquet",
    output:
        "{run}/evaluations/{evaluation}/{step}.scores.parquet",
    log:
        "{run}/logs/evaluate/{evaluation}-{step}-score.log",
    benchmark:
        "{run}/benchmarks/evaluate_score/{evaluation}-{step}.tsv"
    threads: lambda w: need.threads(config_of(w), "score")
    resources:
        gpu=lambda w: need.gpus(config_of(w), "score"),
        cpus_per_task=lambda w: need.threads(config_of(w), "score"),
    shell:
        "earl score --config {wildcards.run:q}/config.json --rollouts {input:q} --out {output:q} 2>&1 | tee {log:q}"


rule evaluate:
    input:
        rollouts="{run}/evaluations/{evaluation}/{step}.rollouts.parquet",
        scores="{run}/evaluations/{evaluation}/{step}.scores.parquet",
    output:
        table="{run}/evaluations/{evaluation}/{step}.parquet",
        summary="{run}/evaluations/{evaluation}/{step}.json",
    log:
        "{run}/logs/evaluate/{evaluation}-{step}.log",
    shell:
        "earl evaluate --config {wildcards.run:q}/config.json --name {wildcards.evaluation}"
        " --iteration {wildcards.step} --rollouts {input.rollouts:q} --scores {input.scores:q} --out {output.table:q}"
        " 2>&1 | tee {log:q}"
