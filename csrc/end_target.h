// Ends what begin_target.h began; with GCC that lasts until the end of the unit.
#if defined(__clang__)
#pragma clang attribute pop
#endif
