# Sampling: one job a shard, all from the policy of the iteration before; then what the judge says about each shard.


rule generate:
    input:
        policy=previous_policy,
        vision=lambda w: ancient(vision_tokenizer(w)),
        prompts=lambda w: datasets(w.run, PLANS[w.run].config.train_paths_file),
    output:
        "{run}/iterations/{step}/rollouts/{shard}.parquet",
    log:
        "{run}/logs/generate/{step}-{shard}.log",
    benchmark:
        "{run}/benchmarks/generate/{step}-{shard}.tsv"
    wildcard_constraints:
        run=IN_WINDOW,
    threads: lambda w: PLANS[w.run].config.cpu_threads
    params:
        earl=launched("generate"),
        restore=restore(previous),
        policy=lambda w: previous(w).policy,
    shell:
        "({params.restore}{params.earl} generate --config {wildcards.run}/config.json --iteration {wildcards.step}"
        " --shard {wildcards.shard} --policy {params.policy} --out {output}) 2>&1 | tee {log}"


rule score:
    input:
        "{run}/iterations/{step}/rollouts/{shard}.parquet",
    output:
        "{run}/iterations/{step}/scores/{shard}.parquet",
    log:
        "{run}/logs/score/{step}-{shard}.log",
    benchmark:
        "{run}/benchmarks/score/{step}-{shard}.tsv"
    wildcard_constraints:
        run=IN_WINDOW,
    threads: lambda w: PLANS[w.run].config.cpu_threads
    resources:
        gpu=judge_gpus,
    params:
        earl=launched("score"),
    shell:
        "{params.earl} score --config {wildcards.run}/config.json --rollouts {input} --out {output} 2>&1 | tee {log}"
