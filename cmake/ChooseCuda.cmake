# Whether the CUDA kernels are built: for a torch that has CUDA, where nvcc of the same major version is found.
# Most machines have such a torch and no nvcc; there the CPU kernels are built and it is said what is missing.

# The nvcc that CMake would take, and else the one that torch would take where none is on PATH; empty if there is none.
function(find_nvcc variable)
  if(CMAKE_CUDA_COMPILER AND EXISTS "${CMAKE_CUDA_COMPILER}")
    set(nvcc "${CMAKE_CUDA_COMPILER}")
  elseif(NOT "$ENV{CUDACXX}" STREQUAL "")
    separate_arguments(named NATIVE_COMMAND "$ENV{CUDACXX}")
    list(GET named 0 named)
    find_program(nvcc "${named}" NO_CACHE)
    if(NOT nvcc)
      message(FATAL_ERROR "CUDACXX names ${named}, which is not there.")
    endif()
  else()
    find_program(nvcc nvcc NO_CACHE HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
    if(NOT nvcc)
      set(nvcc "")
    endif()
  endif()
  set(${variable} "${nvcc}" PARENT_SCOPE)
endfunction()

# Sets `variable` to ON or OFF, and `missing` to what a user has to know where kernels were left out. FGBG_CUDA is
# the user's wish: ON, OFF, or empty. A wish that cannot be met is an error, and so is an nvcc whose
# programs would need another CUDA runtime than the one torch brings.
function(choose_cuda variable missing torch_version torch_cuda nvcc)
  set(${variable} OFF PARENT_SCOPE)
  set(${missing} "" PARENT_SCOPE)
  if(NOT torch_cuda)
    if(FGBG_CUDA)
      message(FATAL_ERROR "FGBG_CUDA is ON but torch ${torch_version} has no CUDA: install a torch that has.")
    endif()
    return()
  endif()
  set(has "torch ${torch_version} has CUDA")
  string(REGEX MATCH "^[0-9]+" wanted "${torch_cuda}")
  set(add "put nvcc of CUDA ${wanted} on PATH or name it in CUDACXX")
  if(NOT "${FGBG_CUDA}" STREQUAL "" AND NOT FGBG_CUDA)
    set(${missing} "${has} but fgbg_cuda was built with FGBG_CUDA=OFF: its functions run as plain PyTorch on CUDA tensors"
        PARENT_SCOPE)
    return()
  endif()
  if(NOT nvcc)
    if(FGBG_CUDA)
      message(FATAL_ERROR "FGBG_CUDA is ON and ${has} but no nvcc was found: ${add}.")
    endif()
    string(CONCAT sentence "${has} but no nvcc was found when fgbg_cuda was built: its functions run as plain PyTorch "
                           "on CUDA tensors; for the CUDA kernels ${add}, and install fgbg_cuda again")
    set(${missing} "${sentence}" PARENT_SCOPE)
    return()
  endif()
  execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE out ERROR_VARIABLE out)
  if(NOT out MATCHES "release (([0-9]+)\\.[0-9]+)")
    message(FATAL_ERROR "${nvcc} --version names no CUDA release: is it nvcc?")
  endif()
  if(NOT CMAKE_MATCH_2 STREQUAL wanted)
    # What an earlier torch was built with is forgotten, so that the next run looks for another.
    unset(CMAKE_CUDA_COMPILER CACHE)
    file(REMOVE "${CMAKE_BINARY_DIR}/CMakeFiles/${CMAKE_VERSION}/CMakeCUDACompiler.cmake")
    message(FATAL_ERROR "torch ${torch_version} has CUDA ${torch_cuda} but ${nvcc} is of CUDA ${CMAKE_MATCH_1}: the major "
                        "versions must be the same. Either ${add}, or leave the CUDA kernels out "
                        "(pip install -C cmake.define.FGBG_CUDA=OFF, or CMAKE_ARGS=-DFGBG_CUDA=OFF in the environment).")
  endif()
  set(${variable} ON PARENT_SCOPE)
endfunction()

# cmake -D TORCH_VERSION=... -D TORCH_CUDA=... [-D FGBG_CUDA=...] [-D NVCC=...] -P ChooseCuda.cmake: the tests.
if(CMAKE_SCRIPT_MODE_FILE STREQUAL CMAKE_CURRENT_LIST_FILE)
  if(NOT DEFINED NVCC)
    find_nvcc(NVCC)
  endif()
  choose_cuda(with_cuda cuda_missing "${TORCH_VERSION}" "${TORCH_CUDA}" "${NVCC}")
  message(STATUS "nvcc: ${NVCC}, kernels: ${with_cuda}, missing: ${cuda_missing}")
endif()
