"""`make sweep PLAN=1`: the settings, the number of stages and the estimated time, without running any stage."""

from __future__ import annotations

from collections import Counter

from flows.running.plan import Recorder
from flows.sweep import CheckedSweep, confirming_stages, sweep_stages, swept_domains
from qadapter.config.experiment import Experiment
from qadapter.config.sweep import PARALLEL_EFFICIENCY, estimate_hours


class SweepRecorder(Recorder):
    """Records stages with any settings."""

    def of(self, _: Experiment) -> SweepRecorder:
        """The same recorder."""
        return self


def plan_text(checked: CheckedSweep) -> str:
    """The plan of a sweep."""
    sweep, experiment, variants = checked.sweep, checked.experiment, checked.variants
    recorder = SweepRecorder()
    domains = swept_domains(experiment, recorder)
    sweep_stages(experiment, domains, variants, recorder)
    of_methods = {variant.method: variant for variant in variants if variant.tuning}  # whichever is chosen
    confirming_stages(domains, list(of_methods.values()), sweep.confirm_seeds, recorder)
    kinds = Counter(stage.task for stage in recorder.stages)
    stages = len(recorder.stages) + 1  # and the report
    hours = estimate_hours(sweep, variants, experiment)
    lines = [
        f"Plan of sweep {sweep.name}: {len(variants)} settings, {stages} stages.",
        f"  profile {checked.request.profile}, domains {', '.join(experiment.domains)}, "
        f"seeds {', '.join(map(str, experiment.seeds))}"
        + (f"; the chosen settings also {', '.join(map(str, sweep.confirm_seeds))}" if sweep.confirm_seeds else ""),
        "",
        "Settings",
    ]
    for name, group in sweep.groups.items():
        own = [variant for variant in variants if name in variant.groups]
        shared = sum(variant.groups[0] != name for variant in own)
        kind = "tuning" if group.tuning else "ablation"
        also = f", {shared} of them shared with a group above" if shared else ""
        lines.append(f"  {name:<26}{kind:<10}{len(own):>3} of {group.method}{also}")
        lines += [f"    {variant.name}" for variant in own if variant.groups[0] == name]
    lines += [
        "",
        "Stages",
        *(f"  {kind:<26}{count:>5}" for kind, count in kinds.items()),
        f"  {'write_sweep':<26}{1:>5}",
        "",
        "Judge of the answers",
        *(f"  {line}" for line in checked.judges()),
    ]
    seconds = ", ".join(f"{name} {value:g} s" for name, value in sweep.seconds.items())
    lines += [
        "",
        f"About {hours:.1f} h from nothing on two cores, {experiment.parallel} stages at a time. What is in the cache",
        f"takes about a second a stage. Counted with: {seconds};",
        f"side by side at {PARALLEL_EFFICIENCY:.0%} of that many times the speed.",
    ]
    return "\n".join(lines)
