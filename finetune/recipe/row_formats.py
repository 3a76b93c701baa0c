"""Names of row formats for those who may not import `finetune.data`; a test holds them to its table."""

from typing import Literal, get_args

ConversationFormat = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "dolly", "oasst"]
PreferenceFormat = Literal["preference", "ultrafeedback", "hh", "orca_dpo", "sharegpt_dpo", "kto"]
RowFormat = Literal["auto", ConversationFormat, "text", PreferenceFormat]

CONVERSATION_FORMATS: tuple[str, ...] = get_args(ConversationFormat)
