"""Early exit per sample: confidences, policies, prediction, fusion."""
