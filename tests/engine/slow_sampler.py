"""One request at a time, one token at a time, in plain Python and doubles: the judge of the batched sampler."""

import math

from kvfold.engine.sampler import matcher_allows, uniform


def slow_scores(logits, state):
    """Adjusted logits as a list; -inf at what may not come."""
    request, params = state.request, state.request.params
    scores = [float(x) for x in logits]
    for token, bias in params.logit_bias:
        scores[token] += bias
    for token in set(request.tokens):
        said = request.outputs.count(token)
        scores[token] *= params.repetition_penalty if scores[token] <= 0 else 1 / params.repetition_penalty
        scores[token] -= params.frequency_penalty * said + params.presence_penalty * (said > 0)
    if params.allowed_token_ids is not None:
        scores = [x if token in params.allowed_token_ids else -math.inf for token, x in enumerate(scores)]
    if state.matcher is not None:
        allowed = matcher_allows(state.matcher, len(scores)).tolist()
        scores = [x if ok else -math.inf for x, ok in zip(scores, allowed, strict=True)]
    if request.num_outputs < params.min_tokens:
        for token in (*state.eos_ids, *params.stop_token_ids):
            scores[token] = -math.inf
    for word in state.bad_words:
        said = request.outputs
        if len(word) == 1 or (len(said) >= len(word) - 1 and tuple(said[len(said) - len(word) + 1 :]) == word[:-1]):
            scores[word[-1]] = -math.inf
    return scores


def probabilities(scores):
    most = max(scores)
    raised = [math.exp(x - most) for x in scores]
    total = sum(raised)
    return [x / total for x in raised]


def slow_sample(logits, state):
    """The token, and the least distance to another choice: of logits where greedy, of the cumulated probability where drawn."""
    params, scores = state.request.params, slow_scores(logits, state)
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if params.temperature == 0:
        return order[0], scores[order[0]] - scores[order[1]]
    scores = [x / params.temperature for x in scores]
    margin = 1.0
    if 0 < params.top_k < len(scores):
        least = scores[order[params.top_k - 1]]
        margin = min(margin, least - scores[order[params.top_k]]) if scores[order[params.top_k]] < least else margin
        scores = [x if x >= least else -math.inf for x in scores]
    if params.top_p < 1:
        chances, before, kept = probabilities(scores), 0.0, set()
        for token in order:
            margin = min(margin, abs(before - params.top_p) or 1.0)
            if before < params.top_p:
                kept.add(token)
            before += chances[token]
        scores = [x if token in kept else -math.inf for token, x in enumerate(scores)]
    if params.min_p > 0:
        least = max(scores) + math.log(params.min_p)
        margin = min([margin, *(abs(x - least) for x in scores if x > -math.inf)])
        scores = [x if x >= least else -math.inf for x in scores]
    point, total = uniform(state.request.seed, state.request.num_outputs), 0.0
    for token, chance in enumerate(probabilities(scores)):
        total += chance
        if chance:
            margin = min(margin, abs(total - point))
        if total > point:
            return token, margin
    return max(token for token in range(len(scores)) if scores[token] > -math.inf), 0.0
