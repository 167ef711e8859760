"""The search for thresholds on many samples and exits, where a single change of a threshold often helps no more."""

import torch

from timm_dfs.calibration.threshold_search import ThresholdSearch, within_budget

FLOPS = [10, 20, 35, 45, 60, 80]
SAMPLES = 3000


def made_up(seed):
    """Confidences (E, N) and correct predictions (E, N): deeper exits are better, and surer of what they get right."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(FLOPS), SAMPLES)
    ability, difficulty = torch.linspace(-0.5, 1.5, len(FLOPS))[:, None], torch.randn(SAMPLES, generator=generator)
    margin = ability - difficulty + 0.8 * torch.randn(shape, generator=generator)
    correct = margin > 0
    sure = 1.5 * margin.abs() + torch.where(correct, 0.3, -0.6) + 0.7 * torch.randn(shape, generator=generator)
    return sure.sigmoid(), correct


def accuracy(search, confidences, correct, budget):
    """Accuracy, percent, of the best thresholds within a budget."""
    leaves = confidences >= torch.tensor(search.best(within_budget(budget, FLOPS[-1])))[:, None]
    leaves[-1] = True
    return 100 * correct.gather(0, leaves.int().argmax(0)[None]).double().mean().item()


def test_a_further_exit_costs_next_to_no_accuracy():
    """It could be switched off, so that a search that found the best thresholds would lose none."""
    confidences, correct = made_up(seed=0)
    last = len(FLOPS) - 1
    everything = ThresholdSearch(confidences, correct, FLOPS, range(len(FLOPS)))
    for switched_off in range(last):
        exits = set(range(len(FLOPS))) - {switched_off}
        fewer = ThresholdSearch(confidences, correct, FLOPS, sorted(exits))
        for budget in (25, 50):
            best = accuracy(fewer, confidences, correct, budget)
            assert accuracy(everything, confidences, correct, budget) > best - 0.4, (switched_off, budget)
