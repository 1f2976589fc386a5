"""The small core: pure maths of groups, ratios, the learning signal, the trigger and the choice. No I/O."""
