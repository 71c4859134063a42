"""The adapter store: identities, plans, PEFT files, validation, the durable catalogue and its blobs."""

from lora_store.adapter import LOCAL_TENANT, AdapterRef, AdapterWeights, ModuleWeights, Sample, is_valid_name
from lora_store.blobs import BlobStore
from lora_store.bounded_files import Limits
from lora_store.catalogue import Catalogue
from lora_store.errors import (
    AdapterNotFound,
    AdapterRefused,
    BlobCorrupted,
    ConditionalWritesMissing,
    EncoderIncomplete,
    FileRefused,
    GenerationGone,
    LoraStoreError,
    NameTaken,
    PlanInvalid,
    PublicNameTaken,
    QuotaExceeded,
    StoreDamaged,
    StoreFull,
    StoreIsNewer,
    StoreUnavailable,
    VersionConflict,
)
from lora_store.events import ActivateEncoder, Approve, Embed, Event, Publish, Rank, SetTrial, SetVisibility, Withdraw
from lora_store.feedback import Feedback
from lora_store.garbage_collection import BlobCheck, Collected
from lora_store.location import Location
from lora_store.names import KEPT_POLICIES, MAX_POLICY_CHARS, NamedPolicy, policy_digest
from lora_store.peft_config import PeftConfig
from lora_store.peft_files import write_peft_folder
from lora_store.plan import BASE_PLAN, Plan, PlannedAdapter
from lora_store.quota import TenantQuota
from lora_store.rankings import RankedAdapter, Ranking
from lora_store.records import VISIBILITIES, AdapterRecord, Embedding, OutputProfile, Visibility
from lora_store.rules import Precondition
from lora_store.snapshot import KEPT_VERSIONS, ActiveEncoder, Key, Snapshot
from lora_store.staging import Edit, Kept, Staged
from lora_store.store import LoraStore, Withdrawn
from lora_store.strategies.registry import ROUTED_STRATEGIES, STRATEGIES, RoutedStrategy, Strategy
from lora_store.strategies.strategy import MAX_PLAN_ADAPTERS, StrategyOption
from lora_store.trials import Trial, TrialVersion
from lora_store.validation import TEMPLATES, CheckedFolder, Label, check_folder
from lora_store.weights_blob import check_digest, decode_weights, encode_weights, hash_blob, weights_in

__all__ = [
    "BASE_PLAN",
    "KEPT_POLICIES",
    "KEPT_VERSIONS",
    "LOCAL_TENANT",
    "MAX_PLAN_ADAPTERS",
    "MAX_POLICY_CHARS",
    "ROUTED_STRATEGIES",
    "STRATEGIES",
    "TEMPLATES",
    "VISIBILITIES",
    "ActivateEncoder",
    "ActiveEncoder",
    "AdapterNotFound",
    "AdapterRecord",
    "AdapterRef",
    "AdapterRefused",
    "AdapterWeights",
    "Approve",
    "BlobCheck",
    "BlobCorrupted",
    "BlobStore",
    "Catalogue",
    "CheckedFolder",
    "Collected",
    "ConditionalWritesMissing",
    "Edit",
    "Embed",
    "Embedding",
    "EncoderIncomplete",
    "Event",
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
    "OutputProfile",
    "PeftConfig",
    "Plan",
    "PlanInvalid",
    "PlannedAdapter",
    "Precondition",
    "PublicNameTaken",
    "Publish",
    "QuotaExceeded",
    "Rank",
    "RankedAdapter",
    "Ranking",
    "RoutedStrategy",
    "Sample",
    "SetTrial",
    "SetVisibility",
    "Snapshot",
    "Staged",
    "StoreDamaged",
    "StoreFull",
    "StoreIsNewer",
    "StoreUnavailable",
    "Strategy",
    "StrategyOption",
    "TenantQuota",
    "Trial",
    "TrialVersion",
    "VersionConflict",
    "Visibility",
    "Withdraw",
    "Withdrawn",
    "check_digest",
    "check_folder",
    "decode_weights",
    "encode_weights",
    "hash_blob",
    "is_valid_name",
    "policy_digest",
    "weights_in",
    "write_peft_folder",
]
