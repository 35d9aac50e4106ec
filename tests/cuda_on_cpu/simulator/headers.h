// What every translated source includes: compiled once for all operators, and for all mistakes planted in them.

#pragma once

#include "device.h"
#include "new_memory.h"

#include <ATen/CPUFunctions.h>
#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <torch/library.h>
