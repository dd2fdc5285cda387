# Iterations by stage, each job a cold process. By segment, these rules make files of old iterations again.


# One job a shard, all from the policy of the iteration before.
rule generate:
    input:
        policy=policy_before,
        vision=vision_tokenizer,
        prompts=prompts,
    output:
        "{run}/iterations/{step}/rollouts/{shard}.parquet",
    log:
        "{run}/logs/generate/{step}-{shard}.log",
    benchmark:
        "{run}/benchmarks/generate/{step}-{shard}.tsv"
    threads: lambda w: settings_of(w).cpu_threads
    resources:
        gpu=lambda w: need.sampling_gpus(settings_of(w)),
    params:
        policy=lambda w: previous(w).policy,
    shell:
        "earl generate --config {wildcards.run:q}/config.json --iteration {wildcards.step} --shard {wildcards.shard}"
        " --policy {params.policy:q} --out {output:q} 2>&1 | tee {log:q}"


rule score:
    input:
        "{run}/iterations/{step}/rollouts/{shard}.parquet",
    output:
        "{run}/iterations/{step}/scores/{shard}.parquet",
    log:
        "{run}/logs/score/{step}-{shard}.log",
    benchmark:
        "{run}/benchmarks/score/{step}-{shard}.tsv"
    threads: lambda w: settings_of(w).cpu_threads
    resources:
        gpu=lambda w: need.judging_gpus(settings_of(w)),
    shell:
        "earl score --config {wildcards.run:q}/config.json --rollouts {input:q} --out {output:q} 2>&1 | tee {log:q}"


# The checkpoint before comes first: dependencies are followed in this order, and down this one the way back takes one
# step an iteration, where scores and rollouts would take three. `evaluated` is waited for, since pruning then drops the
# policies that these evaluations need. Policy and trainer state are written, too, but belong to no rule but `restore`.
rule train:
    input:
        checkpoint=checkpoint_before,
        rollouts=lambda w: files.shards(plan(w), int(w.step), "rollouts"),
        scores=lambda w: files.shards(plan(w), int(w.step), "scores"),
        reference=lambda w: needed(files.start(plan(w))),
        evaluated=lambda w: ancient(
            files.evaluations_before_pruning(plan(w), int(w.step))
        ),
    output:
        episodes="{run}/iterations/{step}/train/episodes.parquet",
        metrics="{run}/iterations/{step}/train/metrics.json",
    log:
        "{run}/logs/train/{step}.log",
    benchmark:
        "{run}/benchmarks/train/{step}.tsv"
    threads: lambda w: need.training_threads(settings_of(w))
    resources:
        gpu=lambda w: need.training_gpus(settings_of(w)),
    shell:
        "(earl train --config {wildcards.run:q}/config.json --iteration {wildcards.step} --run {wildcards.run:q}"
        " && earl prune --run {wildcards.run:q} --after {wildcards.step}) 2>&1 | tee {log:q}"


# A checkpoint that retention has dropped, or that a segment has never written: trained again over stored scores.
rule restore:
    input:
        nothing_once_restorable,
    output:
        policy="{run}/iterations/{step}/policy/manifest.json",
        trainer="{run}/iterations/{step}/trainer/manifest.json",
    log:
        "{run}/logs/restore/{step}.log",
    threads: lambda w: need.training_threads(settings_of(w))
    resources:
        gpu=lambda w: need.training_gpus(settings_of(w)),
    shell:
        "earl restore --run {wildcards.run:q} --iteration {wildcards.step} 2>&1 | tee {log:q}"
