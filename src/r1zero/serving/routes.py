"""The routes of the policy server that we use. No other exists for anybody."""

from r1zero.serving import POLICY_ROUTE

COMPLETIONS = "/v1/completions"
LOAD_ADAPTER = "/v1/load_lora_adapter"
SLEEP, WAKE_UP = "/sleep", "/wake_up"
START, UPDATE, FINISH = "/start_weight_update", "/update_weights", "/finish_weight_update"
ROUTES = frozenset(
    {
        *(("GET", path) for path in ("/health", "/v1/models", "/get_world_size", "/is_sleeping", "/openapi.json")),
        ("GET", POLICY_ROUTE),
        *(("POST", path) for path in (COMPLETIONS, LOAD_ADAPTER, "/v1/unload_lora_adapter")),
        *(("POST", path) for path in ("/init_weight_transfer_engine", START, UPDATE, FINISH)),
        *(("POST", path) for path in ("/reset_prefix_cache", SLEEP, WAKE_UP)),
    }
)
