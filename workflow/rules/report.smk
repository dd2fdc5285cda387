# The end of a run: every file is checked against the digests in the others, also those that no plan looks at any more.


rule verify:
    input:
        lambda w: files.finished(plan(w)),
    output:
        "{run}/verify.json",
    log:
        "{run}/logs/verify.log",
    shell:
        "(earl prune --run {wildcards.run:q} && earl verify --run {wildcards.run:q} --out {output:q})"
        " 2>&1 | tee {log:q}"


rule report:
    input:
        lambda w: files.finished(plan(w)),
        verify="{run}/verify.json",
    output:
        "{run}/report.html",
    log:
        "{run}/logs/report.log",
    shell:
        "earl report --run {wildcards.run:q} --out {output:q} 2>&1 | tee {log:q}"
