# A run from its start on: iterations by segment, or by stage. By segment, the rules of the stages still make files of
# old iterations again that are asked for by name. Where a job may have more threads than this machine has cores, which
# is as many as Snakemake lets it have, `cpus_per_task` says so.


# Where the configuration requires something of the judge, no run starts without it.
rule judge_gate:
    output:
        "{run}/judge_check.json",
    log:
        "{run}/logs/judge_gate.log",
    threads: lambda w: need.threads(config_of(w), "score")
    resources:
        gpu=lambda w: need.gpus(config_of(w), "score"),
        cpus_per_task=lambda w: need.threads(config_of(w), "score"),
    shell:
        "earl judge check --config {wildcards.run:q}/config.json --out {output:q} 2>&1 | tee {log:q}"


rule start:
    input:
        unpack(INPUTS.start),
    output:
        "{run}/iterations/000000/start.json",
    log:
        "{run}/logs/start.log",
    params:
        policy=lambda w: inputs.starting_policy(PLANS[w.run]),
    shell:
        "earl start --run {wildcards.run:q} --policy {params.policy:q} 2>&1 | tee {log:q}"


# A segment: one program that keeps its models in memory and makes the evaluations of its policies, too. Its record is
# the only output, so that one that fails loses none of its iterations.
rule iterate:
    input:
        unpack(INPUTS.iterate),
    output:
        "{run}/segments/{step}.json",
    log:
        "{run}/logs/iterate/{step}.log",
    benchmark:
        "{run}/benchmarks/iterate/{step}.tsv"
    threads: lambda w: need.threads(config_of(w), "iterate")
    resources:
        gpu=lambda w: need.gpus(config_of(w), "iterate"),
        cpus_per_task=lambda w: need.threads(config_of(w), "iterate"),
    shell:
        "earl iterate --run {wildcards.run:q} --to {wildcards.step} 2>&1 | tee {log:q}"


# One job a shard, all from the policy of the iteration before.
rule generate:
    input:
        unpack(INPUTS.generate),
    output:
        "{run}/iterations/{step}/rollouts/{shard}.parquet",
    log:
        "{run}/logs/generate/{step}-{shard}.log",
    benchmark:
        "{run}/benchmarks/generate/{step}-{shard}.tsv"
    threads: lambda w: need.threads(config_of(w), "generate")
    resources:
        gpu=lambda w: need.gpus(config_of(w), "generate"),
        cpus_per_task=lambda w: need.threads(config_of(w), "generate"),
    params:
        before=lambda w: f"{int(w.step) - 1:06d}",
    shell:
        "earl generate --config {wildcards.run:q}/config.json --iteration {wildcards.step} --shard {wildcards.shard}"
        " --policy {wildcards.run:q}/iterations/{params.before}/policy --out {output:q} 2>&1 | tee {log:q}"


rule score:
    input:
        "{run}/iterations/{step}/rollouts/{shard}.parquet",
    output:
        "{run}/iterations/{step}/scores/{shard}.parquet",
    log:
        "{run}/logs/score/{step}-{shard}.log",
    benchmark:
        "{run}/benchmarks/score/{step}-{shard}.tsv"
    threads: lambda w: need.threads(config_of(w), "score")
    resources:
        gpu=lambda w: need.gpus(config_of(w), "score"),
        cpus_per_task=lambda w: need.threads(config_of(w), "score"),
    shell:
        "earl score --config {wildcards.run:q}/config.json --rollouts {input:q} --out {output:q} 2>&1 | tee {log:q}"


# Policy and trainer state are written, too, before the metrics; the rules wait for these.
rule train:
    input:
        unpack(INPUTS.train),
    output:
        episodes="{run}/iterations/{step}/train/episodes.parquet",
        metrics="{run}/iterations/{step}/train/metrics.json",
    log:
        "{run}/logs/train/{step}.log",
    benchmark:
        "{run}/benchmarks/train/{step}.tsv"
    threads: lambda w: need.threads(config_of(w), "train")
    resources:
        gpu=lambda w: need.gpus(config_of(w), "train"),
        cpus_per_task=lambda w: need.threads(config_of(w), "train"),
    shell:
        "(earl train --config {wildcards.run:q}/config.json --iteration {wildcards.step} --run {wildcards.run:q}"
        " && earl prune --run {wildcards.run:q} --after {wildcards.step}) 2>&1 | tee {log:q}"


# A checkpoint that retention has dropped, or that a segment has never written: trained again over stored scores.
rule restore:
    input:
        INPUTS.restore,
    output:
        policy="{run}/iterations/{step}/policy/manifest.json",
        trainer="{run}/iterations/{step}/trainer/manifest.json",
    log:
        "{run}/logs/restore/{step}.log",
    threads: lambda w: need.threads(config_of(w), "restore")
    resources:
        gpu=lambda w: need.gpus(config_of(w), "restore"),
        cpus_per_task=lambda w: need.threads(config_of(w), "restore"),
    shell:
        "earl restore --run {wildcards.run:q} --iteration {wildcards.step} 2>&1 | tee {log:q}"
