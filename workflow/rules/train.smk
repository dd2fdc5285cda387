# Learning: where a run starts from, and the step from one policy to the next.


# Where the configuration requires something of the judge, no run starts without it. One that has started goes on.
rule judge_gate:
    output:
        "{run}/judge_check.json",
    log:
        "{run}/logs/judge_gate.log",
    benchmark:
        "{run}/benchmarks/judge_gate.tsv"
    threads: lambda w: PLANS[w.run].config.cpu_threads
    resources:
        gpu=judge_gpus,
    params:
        earl=launched("judge_gate"),
    shell:
        "{params.earl} judge check --config {wildcards.run}/config.json --out {output} 2>&1 | tee {log}"


rule start:
    input:
        policy=lambda w: stands_for(starting_policy(w)),
        vision=vision_tokenizer_to_start,
        gate=lambda w: ancient(judge_check(w)),
    output:
        "{run}/iterations/000000/start.json",
    log:
        "{run}/logs/start.log",
    params:
        earl=EARL,
        policy=starting_policy,
    shell:
        "{params.earl} start --run {wildcards.run} --policy {params.policy} 2>&1 | tee {log}"


rule train:
    # The previous policy comes first: dependencies are followed in this order, and down this one the way back takes
    # one step an iteration, where scores and rollouts would take three.
    # `evaluated` is waited for, since pruning then drops the policies that these evaluations need.
    input:
        policy=previous_policy,
        trainer=previous_trainer,
        rollouts=shards("rollouts"),
        scores=shards("scores"),
        reference="{run}/iterations/000000/start.json",
        evaluated=lambda w: ancient(evaluations_before_pruning(w)),
    output:
        policy="{run}/iterations/{step}/policy/manifest.json",
        trainer="{run}/iterations/{step}/trainer/manifest.json",
        episodes="{run}/iterations/{step}/train/episodes.parquet",
        metrics="{run}/iterations/{step}/train/metrics.json",
    log:
        "{run}/logs/train/{step}.log",
    benchmark:
        "{run}/benchmarks/train/{step}.tsv"
    wildcard_constraints:
        run=IN_WINDOW,
    threads: lambda w: PLANS[w.run].config.cpu_threads * PLANS[w.run].config.train_processes
    params:
        here=EARL,
        earl=launched("train"),
        restore=restore(previous),
    shell:
        "({params.restore}{params.earl} train --config {wildcards.run}/config.json --iteration {wildcards.step} --run {wildcards.run}"
        " && {params.here} prune --run {wildcards.run} --after {wildcards.step}) 2>&1 | tee {log}"
