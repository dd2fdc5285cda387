# The end of a run: what the window cut hides is checked against the digests in the files; then the report.


rule verify:
    input:
        finished,
    output:
        "{run}/verify.json",
    log:
        "{run}/logs/verify.log",
    params:
        earl=EARL,
    shell:
        "({params.earl} prune --run {wildcards.run}"
        " && {params.earl} verify --run {wildcards.run} --out {output}) 2>&1 | tee {log}"


rule report:
    input:
        finished,
        verify="{run}/verify.json",
    output:
        "{run}/report.html",
    log:
        "{run}/logs/report.log",
    params:
        earl=EARL,
    shell:
        "{params.earl} report --run {wildcards.run} --out {output} 2>&1 | tee {log}"
