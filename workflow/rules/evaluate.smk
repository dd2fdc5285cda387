# Held-out prompts: sampled with a given policy, judged, summarised.


rule evaluate_generate:
    input:
        policy=policy,
        vision=lambda w: ancient(vision_tokenizer(w)),
        prompts=lambda w: datasets(
            w.run,
            paths.evaluation_data(PLANS[w.run].config, w.evaluation).references,
        ),
    output:
        "{run}/evaluations/{evaluation}/{step}.rollouts.parquet",
    log:
        "{run}/logs/evaluate/{evaluation}-{step}-generate.log",
    benchmark:
        "{run}/benchmarks/evaluate_generate/{evaluation}-{step}.tsv"
    wildcard_constraints:
        run=EVALUATED,
    threads: lambda w: PLANS[w.run].config.cpu_threads
    params:
        earl=launched("evaluate_generate"),
        restore=restore(iteration),
        policy=lambda w: iteration(w).policy,
    shell:
        "({params.restore}{params.earl} generate --config {wildcards.run}/config.json --iteration {wildcards.step}"
        " --evaluation {wildcards.evaluation} --policy {params.policy} --out {output}) 2>&1 | tee {log}"


rule evaluate_score:
    input:
        "{run}/evaluations/{evaluation}/{step}.rollouts.parquet",
    output:
        "{run}/evaluations/{evaluation}/{step}.scores.parquet",
    log:
        "{run}/logs/evaluate/{evaluation}-{step}-score.log",
    benchmark:
        "{run}/benchmarks/evaluate_score/{evaluation}-{step}.tsv"
    wildcard_constraints:
        run=EVALUATED,
    threads: lambda w: PLANS[w.run].config.cpu_threads
    resources:
        gpu=judge_gpus,
    params:
        earl=launched("evaluate_score"),
    shell:
        "{params.earl} score --config {wildcards.run}/config.json --rollouts {input} --out {output} 2>&1 | tee {log}"


rule evaluate:
    input:
        rollouts="{run}/evaluations/{evaluation}/{step}.rollouts.parquet",
        scores="{run}/evaluations/{evaluation}/{step}.scores.parquet",
    output:
        table="{run}/evaluations/{evaluation}/{step}.parquet",
        summary="{run}/evaluations/{evaluation}/{step}.json",
    log:
        "{run}/logs/evaluate/{evaluation}-{step}.log",
    wildcard_constraints:
        run=EVALUATED,
    # As many as a score stage has, so that it can run where that has run.
    threads: lambda w: PLANS[w.run].config.cpu_threads
    params:
        earl=EARL,
    shell:
        "{params.earl} evaluate --config {wildcards.run}/config.json --name {wildcards.evaluation}"
        " --iteration {wildcards.step} --rollouts {input.rollouts} --scores {input.scores} --out {output.table}"
        " 2>&1 | tee {log}"
