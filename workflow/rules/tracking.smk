# Shows runs elsewhere, from a machine that reaches the internet: Weights & Biases, the Hugging Face hub.
#
# No stage waits for these, and they take no core from one. While a run goes on, a send that fails warns and is made up for by the next one; the last,
# after the report, fails where something is missing, and is done again when the workflow is started again.


rule track:
    input:
        sent_after,
    output:
        "{run}/tracking/wandb-{step}.json",
    log:
        "{run}/logs/track/{step}.log",
    threads: 0
    params:
        earl=EARL,
        best_effort=best_effort,
    shell:
        "{params.earl} track --run {wildcards.run} {params.best_effort} --out {output} < /dev/null 2>&1 | tee {log}"


rule push:
    input:
        sent_after,
    output:
        "{run}/tracking/hub-{step}.json",
    log:
        "{run}/logs/push/{step}.log",
    threads: 0
    params:
        earl=EARL,
        best_effort=best_effort,
    shell:
        "{params.earl} push --run {wildcards.run} {params.best_effort} --out {output} < /dev/null 2>&1 | tee {log}"
