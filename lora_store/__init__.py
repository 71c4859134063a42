"""The adapter store: identities, plans, PEFT files, validation, the durable catalogue and its blobs."""

from lora_store.adapter import LOCAL_TENANT, AdapterRef, AdapterWeights, ModuleWeights, Sample, is_valid_name
from lora_store.bounded_files import Limits
from lora_store.errors import (
    AdapterNotFound,
    AdapterRefused,
    BlobCorrupted,
    EncoderIncomplete,
    FileRefused,
    GenerationGone,
    LoraStoreError,
    NameTaken,
    QuotaExceeded,
    StoreUnavailable,
    VersionConflict,
)
from lora_store.feedback import Feedback
from lora_store.garbage_collection import Collected
from lora_store.location import Location
from lora_store.names import KEPT_POLICIES, MAX_POLICY_CHARS, NamedPolicy, policy_digest
from lora_store.peft_files import write_peft_folder
from lora_store.plan import BASE_PLAN, Plan, PlannedAdapter
from lora_store.quota import TenantQuota
from lora_store.rankings import Ranking
from lora_store.records import VISIBILITIES, AdapterRecord, Embedding, Visibility
from lora_store.rules import Precondition
from lora_store.snapshot import Key, Snapshot
from lora_store.staging import Edit, Kept, Staged
from lora_store.store import LoraStore, Withdrawn
from lora_store.strategies.registry import ROUTED_STRATEGIES, STRATEGIES, RoutedStrategy, Strategy
from lora_store.strategies.strategy import MAX_PLAN_ADAPTERS
from lora_store.trials import Trial, TrialVersion
from lora_store.validation import Label, check_folder
from lora_store.weights_blob import check_digest, decode_weights, weights_in

__all__ = [
    "BASE_PLAN",
    "KEPT_POLICIES",
    "LOCAL_TENANT",
    "MAX_PLAN_ADAPTERS",
    "MAX_POLICY_CHARS",
    "ROUTED_STRATEGIES",
    "STRATEGIES",
    "VISIBILITIES",
    "AdapterNotFound",
    "AdapterRecord",
    "AdapterRef",
    "AdapterRefused",
    "AdapterWeights",
    "BlobCorrupted",
    "Collected",
    "Edit",
    "Embedding",
    "EncoderIncomplete",
    "Feedback",
    "FileRefused",
    "GenerationGone",
    "Kept",
    "Key",
    "Label",
    "Limits",
    "Location",
    "LoraStore",
    "LoraStoreError",
    "ModuleWeights",
    "NameTaken",
    "NamedPolicy",
    "Plan",
    "PlannedAdapter",
    "Precondition",
    "QuotaExceeded",
    "Ranking",
    "RoutedStrategy",
    "Sample",
    "Snapshot",
    "Staged",
    "StoreUnavailable",
    "Strategy",
    "TenantQuota",
    "Trial",
    "TrialVersion",
    "VersionConflict",
    "Visibility",
    "Withdrawn",
    "check_digest",
    "check_folder",
    "decode_weights",
    "is_valid_name",
    "policy_digest",
    "weights_in",
    "write_peft_folder",
]
