"""The ops and the engine on a device: $DATAFLEX_TEST_DEVICE (cuda, or cpu to see that these tests run)."""
